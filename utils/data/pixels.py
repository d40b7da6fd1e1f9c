"""Conversion between uint8 images and floats, with one rounding rule."""

import torch


def to_float(x: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0, 1]."""
    return x.float() / 255


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Floats in [0, 1] (clamped) -> uint8, rounding half up. All code that makes bytes of images uses this function."""
    return (x.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
