"""Makes pictures from tensors: sheets of images, enlarged images, PNG files."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from utils.display.grids import AMPLIFIED, Grid, write_picture


def sheet_grid(images: Tensor, n_columns: int | None = None, padding: int = 2, group: int = 1, gap: int = 0) -> Grid:
    """Return the Grid of sheet(images, ...)."""
    N, _, H, W = images.shape
    return Grid(N, H, W, min(n_columns or math.ceil(math.sqrt(N)), N), padding, group, gap)


def sheet(
    images: Tensor, n_columns: int | None = None, padding: int = 2, group: int = 1, gap: int = 0, background: int = 255
) -> Tensor:
    """Arrange images, uint8 (N, C, H, W), in rows of n_columns. Returns one picture, uint8 (C, h, w), with `background`
    between and around the images.

    group, gap: see utils.display.grids.Grid."""
    grid = sheet_grid(images, n_columns, padding, group, gap)
    picture = torch.full((images.shape[1], *grid.size()), background, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = grid.place(i)
        picture[:, top : top + grid.height, left : left + grid.width] = image
    return picture


def triples(left: Tensor, right: Tensor) -> Tensor:
    """Combine originals (left) and reconstructions (right), both uint8 (N, C, H, W). The result (3N, C, H, W) holds an
    original, a reconstruction and a difference for each pair. The difference is |left - right| times AMPLIFIED, so
    equal pixels are black."""
    left, right = left.cpu(), right.cpu()
    difference = (left.int() - right.int()).abs().mul(AMPLIFIED).clamp(max=255).to(torch.uint8)
    return torch.stack((left, right, difference), dim=1).flatten(0, 1)


TRIPLES = dict(n_columns=12, group=3, gap=6)  # the layout of a sheet of triples


def enlarge(image: Tensor, min_side: int) -> Tensor:
    """Enlarge an image, uint8 (C, H, W), by repeating pixels. The factor is the smallest integer that makes both sides
    at least min_side."""
    factor = max(1, math.ceil(min_side / min(image.shape[1:])))
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def to_pillow(image: Tensor) -> Image.Image:
    """Convert an image, uint8 (C, H, W), to a Pillow image."""
    array = image.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def save_png(path: str | Path, image: Tensor, min_side: int = 1, grid: Grid | None = None) -> None:
    """Write an image, uint8 (C, H, W), to a PNG file, which is complete or absent. Small pictures are enlarged by
    integer factors.

    grid: the Grid of a sheet, which is stored in the file."""
    enlarged = enlarge(image.cpu(), min_side)
    note = grid and grid.scaled(enlarged.shape[1] // image.shape[1]).note()
    write_picture(path, to_pillow(enlarged), pnginfo=note)
