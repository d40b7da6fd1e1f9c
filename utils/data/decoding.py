"""From encoded bytes to pixels: any image file -> a square of one size."""

import contextlib
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

# Whatever a file is called, it is read as one of these: Pillow's other readers (EPS runs Ghostscript)
# are not for files from anywhere.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
LONG_IMAGE = 8  # aspect ratio from which an image is cropped before it is resized
LONGEST_SIDE = 1 << 20  # pixels: Pillow bounds the area (179 million), but keeps a pointer for each row, too
PIECE = 1 << 22  # pixels converted at once: of an image of that area every copy takes 0.7 GB


def decode(data, size, n_channels=3):
    """Encoded bytes -> uint8 (C, size, size): short side resized to `size`, then the centre cut out.

    Any size and mode: transparency is put on white, 16-bit greys are scaled, EXIF rotation applied;
    of an animation the first frame. Raises some Exception for what is not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if max(image.size) > LONGEST_SIDE:
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels: too long")
        image.load()
        set_upright(image)
        image = to_rgb(image)
    if n_channels == 1:
        image = image.convert("L")
    image = resize_and_crop(image, size)
    array = np.array(image, dtype=np.uint8).reshape(size, size, n_channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def set_upright(image):
    """Turn the image as its EXIF data says it was taken; leave it as it is where these cannot be read."""
    with contextlib.suppress(Exception):  # whatever: the pixels are good
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image):
    """Any Pillow mode -> RGB, in pieces where it is large."""
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


def _convert(image):
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(image, size):
    """Resize(size) and CenterCrop(size) of torchvision, pixel for pixel; of long strips to within rounding.

    In Pillow alone, which is what torchvision calls: importing it takes longer than all else at start.
    """
    w, h = image.size
    short = min(w, h)
    new_w, new_h = size * w // short, size * h // short
    left, top = round((new_w - size) / 2), round((new_h - size) / 2)
    if max(w, h) > LONG_IMAGE * short:
        # Resizing all of a 1 x 5000 strip only to cut a square out of it would fill the memory.
        box = (left * w / new_w, top * h / new_h, (left + size) * w / new_w, (top + size) * h / new_h)
        return image.resize((size, size), Image.BILINEAR, box=box)
    if (w, h) != (new_w, new_h):
        image = image.resize((new_w, new_h), Image.BILINEAR)
    return image.crop((left, top, left + size, top + size))
