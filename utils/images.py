"""From tensors to pictures: one rounding rule, sheets, PNG files."""

import math

import torch
from PIL import Image

from utils.io import atomic_write


def to_uint8(x):
    """Floats in [0, 1] (clamped) -> uint8, rounding half up: the one rule by which images become bytes."""
    return (x.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def sheet(images, n_columns=None, padding=2):
    """uint8 (N, C, H, W) -> one picture uint8 (C, h, w): rows of n_columns, white between and around."""
    N, C, H, W = images.shape
    n_columns = min(n_columns or math.ceil(math.sqrt(N)), N)
    n_rows = math.ceil(N / n_columns)
    h, w = H + padding, W + padding
    picture = torch.full((C, n_rows * h + padding, n_columns * w + padding), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        row, column = divmod(i, n_columns)
        top, left = row * h + padding, column * w + padding
        picture[:, top : top + H, left : left + W] = image
    return picture


def pairs(left, right, n_columns=4, padding=2):
    """Originals beside their reconstructions: (N, C, H, W) twice -> a sheet of n_columns pairs a row."""
    both = torch.stack((left.cpu(), right.cpu()), dim=1).flatten(0, 1)
    return sheet(both, 2 * n_columns, padding)


def enlarge(image, min_side):
    """uint8 (C, H, W), each pixel repeated by the least whole factor that makes both sides min_side or more."""
    factor = max(1, math.ceil(min_side / min(image.shape[1:])))
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def save_png(path, image, min_side=1):
    """uint8 (C, H, W) -> a PNG file, complete or absent; small pictures enlarged by whole factors."""
    array = enlarge(image.cpu(), min_side).permute(1, 2, 0).numpy()
    write_png(path, Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array))


def write_png(path, picture):
    """A Pillow image -> a PNG file, complete or absent."""
    with atomic_write(path) as f:
        picture.save(_WriteOnly(f), format="PNG")


class _WriteOnly:
    """Pillow asks for flush and fileno; it is only to write."""

    def __init__(self, file):
        self.write, self.flush = file.write, file.flush
