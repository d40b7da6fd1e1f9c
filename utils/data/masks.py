"""Masks: which pixels of a picture are to change. A mask is drawn in the size of the file (a Pillow image of mode L,
255 where a pixel is to change) and then resized and cropped as the picture is."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils.data.decoding import open_image, resize_and_crop, to_rgb

HALF = 128  # grey values of mask files from here on count as white


def region_mask(size: tuple[int, int], regions: Iterable[tuple[int, int, int, int]]) -> Image.Image:
    """Return the mask of rectangles (top, left, height, width) in pixels. size: (width, height) of the file. Raises
    ValueError if a rectangle is empty or not inside the file."""
    mask = Image.new("L", size)
    for top, left, height, width in regions:
        if min(height, width) < 1 or min(top, left) < 0 or top + height > size[1] or left + width > size[0]:
            region = f"{top} {left} {height} {width}"
            raise ValueError(
                f"the region {region} is not inside the picture, which has {size[1]} rows and {size[0]} columns"
            )
        ImageDraw.Draw(mask).rectangle((left, top, left + width - 1, top + height - 1), fill=255)
    return mask


def file_mask(data: Any) -> Image.Image:
    """Decode the bytes of a mask file; white and transparent pixels are to change. Raises an Exception of any type if
    the bytes are not an image."""
    return white_mask(open_image(data))


def white_mask(image: Image.Image) -> Image.Image:
    """Return the mask of the white and transparent pixels of an upright image."""
    return to_rgb(image).convert("L").point(lambda value: 255 * (value >= HALF))


def scaled_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a mask to the size (width, height) of a picture. Raises ValueError if the aspect ratios differ."""
    if mask.size[0] * size[1] != mask.size[1] * size[0]:
        width, height = mask.size
        raise ValueError(f"the mask has {width} x {height} pixels, and the picture {size[0]} x {size[1]}")
    return mask.resize(size, Image.Resampling.NEAREST)


def transparent_mask(image: Image.Image) -> Image.Image | None:
    """Return the mask of the pixels of an image that are not opaque; None if the image has no transparency."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa") and "transparency" not in image.info:
        return None
    return image.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha < 255))


def fitted_mask(mask: Image.Image, size: int) -> torch.Tensor:
    """Resize and crop a mask as utils.data.decoding.decode does with its picture: (size, size) bool. A pixel is masked
    if it depends on a masked pixel of the file."""
    return torch.from_numpy(np.array(resize_and_crop(mask, size)) > 0)


def mask_outside(kept: str, size: int) -> torch.Tensor:
    """Return the mask that keeps a half of a picture, (size, size) bool. kept: "left", "right", "top", "bottom", or
    "centre", a square of half the side."""
    half, quarter = size // 2, size // 4
    mask = torch.ones(size, size, dtype=torch.bool)
    rows = {"top": slice(half), "bottom": slice(half, None), "centre": slice(quarter, size - quarter)}
    columns = {"left": slice(half), "right": slice(half, None), "centre": slice(quarter, size - quarter)}
    mask[rows.get(kept, slice(None)), columns.get(kept, slice(None))] = False
    return mask
