"""Loads the images that a command line names."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from utils.core.errors import UserError
from utils.core.progress import say
from utils.data.decoding import decode
from utils.data.images import ImageSet, open_images
from utils.data.sources import find_images, read_file

Read = TypeVar("Read")


def load_images(H: Any, split: str, hold_out: bool | None = None) -> ImageSet:
    """Load the images of --dataset in a split, 'train' or 'val'. hold_out: see open_images; default: True if
    --steps_per_eval is given."""
    hold_out = H.steps_per_eval > 0 if hold_out is None else hold_out
    return open_images(H.data_entry, split, H.img_size, H.n_channels, hold_out, H.unique_images, H.split_rule)


def note_images(H: Any) -> None:
    """For --dry_run: print one line with the number of images of --dataset, or with the error."""
    try:
        counts = [f"{len(load_images(H, 'train'))} train"]
        if H.steps_per_eval:
            counts.append(f"{len(load_images(H, 'val'))} validate")
        say(f"images of {H.data_entry['origin']}: {', '.join(counts)}")
    except UserError as error:
        say(f"note: {error}")


def find_pictures(flag: str, paths: Iterable[str]) -> list[str]:
    """Return the files of a flag that names files and folders of pictures. Raises UserError for a path that does not
    exist, and for a folder without pictures."""
    names: list[str] = []
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"--{flag}: {path!r} does not exist")
        found = sorted(find_images(path)) if Path(path).is_dir() else [path]
        if not found:
            raise UserError(f"--{flag}: no images under {path!r}")
        names += found
    return names


def read_picture(flag: str, name: str, decode: Callable[[bytes], Read], read: Callable[[str], Any] = read_file) -> Read:
    """Read a file that a flag names and return decode(its bytes). Raises UserError if the file cannot be decoded."""
    try:
        return decode(read(name))
    except UserError:
        raise
    except Exception:  # Pillow's readers can raise any exception
        raise UserError(f"--{flag}: {name!r} cannot be decoded") from None


def read_pictures(H: Any, flag: str, names: Iterable[str], read: Callable[[str], Any] = read_file) -> torch.Tensor:
    """Read files that a flag names, and decode them like training images: uint8 (N, C, H, W)."""
    to_pixels = partial(decode, size=H.img_size, n_channels=H.n_channels)
    return torch.stack([read_picture(flag, name, to_pixels, read) for name in names])
