"""Decodes the bytes of image files to the pixels of square images of a given size."""

import contextlib
import io
import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

# A file is read as one of these formats. The name of the file does not matter. Pillow's other readers are unsafe for
# files of unknown origin (the EPS reader runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
LONG_IMAGE = 8  # an image with at least this aspect ratio is cropped before it is resized
LONGEST_SIDE = 1 << 20  # pixels; Pillow limits only the area (179 million), but also needs memory for each row
PIECE = 1 << 22  # pixels that are converted at once, because a copy of the largest image takes 0.7 GB


WIDEST = 4 / 3  # the largest aspect ratio of a random crop; the smallest is 3/4
ATTEMPTS = 10  # the most attempts to draw a random crop that fits into the image


class Crop(NamedTuple):
    """Describes a random crop of an image. least: the smallest allowed share of the area. seed: the seed of the size
    and place."""

    least: float
    seed: int


def decode(data: Any, size: int, n_channels: int = 3, crop: Crop | None = None) -> torch.Tensor:
    """Decode bytes to pixels, uint8 (C, size, size). The short side is resized to `size`, and the image is then cropped
    at the centre. If `crop` is given, the random crop is resized instead.

    Accepts any size and mode. Transparent images get a white background, 16-bit grey images are scaled, and the EXIF
    rotation is applied. Of an animation, only the first frame is decoded. Raises an Exception of any type if the bytes
    are not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pixels_of(open_image(data), size, n_channels, crop)


def pixels_of(image: Image.Image, size: int, n_channels: int = 3, crop: Crop | None = None) -> torch.Tensor:
    """Convert an upright Pillow image of any size and mode as `decode` does: uint8 (C, size, size)."""
    image = to_rgb(image)
    if n_channels == 1:
        image = image.convert("L")
    image = resize_and_crop(image, size) if crop is None else crop_and_resize(image, size, crop)
    array = np.array(image, dtype=np.uint8).reshape(size, size, n_channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def open_image(data: Any) -> Image.Image:
    """Decode bytes to a Pillow image of any mode, upright. Raises an Exception of any type if the bytes are not an
    image."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if max(image.size) > LONGEST_SIDE:
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels: too long")
    image.load()
    set_upright(image)
    return image


def set_upright(image: Image.Image) -> None:
    """Rotate the image as its EXIF data requires. If the EXIF data cannot be read, leave the image unchanged."""
    with contextlib.suppress(Exception):  # the pixels are good even if the EXIF data raise an error
        ImageOps.exif_transpose(image, in_place=True)


def upright(image: Image.Image) -> Image.Image:
    """Return a copy of an image, rotated as its EXIF data requires."""
    image = image.copy()
    set_upright(image)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB. A large image is converted in pieces."""
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
    if image.mode.startswith("I"):  # scale 16-bit grey here, because Pillow's conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Compute the same pixels as torchvision's Resize(size) and CenterCrop(size). For long strips the result can differ
    by rounding.

    This function uses Pillow directly, as torchvision does, because importing torchvision would take most of the
    start-up time.
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
    """Compute torchvision's RandomResizedCrop(size) with the box of this crop."""
    return image.crop(random_box(*image.size, crop)).resize((size, size), Image.Resampling.BILINEAR)


def random_box(width: int, height: int, crop: Crop) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop, with the distribution of torchvision's RandomResizedCrop. The share
    of the area is uniform in [least, 1]. The logarithm of the aspect ratio is uniform between log(3/4) and log(4/3). If
    no attempt fits into the image, return the largest box in the centre with an allowed aspect ratio."""
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
