"""Converts between uint8 images and floats, with one rounding rule."""

import torch


def to_float(x: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float32 in [0, 1]."""
    return x.float() / 255


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Convert floats, clamped to [0, 1], to uint8. Halves are rounded up. All code that converts images to bytes uses
    this function."""
    return (x.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
