"""Decodes image files: encoded bytes -> the pixels of a square image of a given size."""

import contextlib
import io
import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

# A file is read as one of these formats, whatever its name. Pillow's other readers are unsafe for files of unknown
# origin (the EPS reader runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
LONG_IMAGE = 8  # aspect ratio from which an image is cropped before it is resized
LONGEST_SIDE = 1 << 20  # pixels. Pillow limits only the area (179 million), but needs memory for each row, too
PIECE = 1 << 22  # pixels converted at once: each copy of an image of the largest area takes 0.7 GB


WIDEST = 4 / 3  # aspect ratio of a random crop; 3/4 is the narrowest
ATTEMPTS = 10  # attempts to draw a random crop that fits into the image


class Crop(NamedTuple):
    """A random crop of an image: the least share of the area that it has, and the seed of its size and place."""

    least: float
    seed: int


def decode(data: Any, size: int, n_channels: int = 3, crop: Crop | None = None) -> torch.Tensor:
    """Encoded bytes -> uint8 (C, size, size): short side resized to `size`, then cropped at the centre. With crop, this
    part of the image instead, resized.

    Accepts any size and mode. Transparent images get a white background, 16-bit grey images are scaled, and the EXIF
    rotation is applied. An animation gives its first frame. Raises an Exception of any type if the bytes are not an
    image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if max(image.size) > LONGEST_SIDE:
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels: too long")
        image.load()
        set_upright(image)
        image = to_rgb(image)
    if n_channels == 1:
        image = image.convert("L")
    image = resize_and_crop(image, size) if crop is None else crop_and_resize(image, size, crop)
    array = np.array(image, dtype=np.uint8).reshape(size, size, n_channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def set_upright(image: Image.Image) -> None:
    """Rotate the image as its EXIF data requires; leave it unchanged if the EXIF data cannot be read."""
    with contextlib.suppress(Exception):  # any error in the EXIF data: the pixels are good
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB. A large image is converted in pieces."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    if width * height <= PIECE:
        return _convert(image)
    result = Image.new("RGB", image.size)
    rows = max(1, PIECE // width)
    for top in range(0, height, rows):
        result.paste(_convert(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return result


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize(size) and CenterCrop(size) of torchvision, pixel for pixel. For long strips the result can differ by
    rounding.

    It uses Pillow directly, as torchvision does: importing torchvision would take most of the start-up time.
    """
    w, h = image.size
    short = min(w, h)
    new_w, new_h = size * w // short, size * h // short
    left, top = round((new_w - size) / 2), round((new_h - size) / 2)
    if max(w, h) > LONG_IMAGE * short:
        # Resizing a complete 1 x 5000 strip only to crop a square would use too much memory.
        box = (left * w / new_w, top * h / new_h, (left + size) * w / new_w, (top + size) * h / new_h)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if (w, h) != (new_w, new_h):
        image = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def crop_and_resize(image: Image.Image, size: int, crop: Crop) -> Image.Image:
    """RandomResizedCrop(size) of torchvision with the box that belongs to a crop."""
    return image.crop(random_box(*image.size, crop)).resize((size, size), Image.Resampling.BILINEAR)


def random_box(width: int, height: int, crop: Crop) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop, with the distribution of torchvision's RandomResizedCrop: the share of the
    area is uniform in [least, 1], the logarithm of the aspect ratio between those of 3/4 and 4/3. If no attempt fits
    into the image: the largest box in the centre with such a ratio."""
    rng = np.random.default_rng(crop.seed)
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(crop.least, 1)
        aspect = WIDEST ** rng.uniform(-1, 1)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * WIDEST)), min(height, round(width * WIDEST))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
