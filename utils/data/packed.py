"""Stores decoded images in a packed cache (--cache_images). An epoch then reads pixels instead of decoding files.

A file packed/<dataset>_<split>_<key>/part_<first image>.u8 holds images one after the other, uint8 (C, H, W). The
CRC-32 of each image follows after the last image; 0 means that the image is broken. The key is a hash of the images'
files, sizes, times and resizing. The file origin.json holds further values that are compared (see utils.core.cache).
Each part is complete or absent, so that a killed run continues with the next part. An image with a wrong CRC is decoded
from its image file.
"""

import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core import distributed
from utils.core.cache import ABANDONED, is_current
from utils.core.errors import DamagedFile, UserError
from utils.core.files import atomic_write, hash_json, read_json, remove_temporaries, write_json
from utils.core.job import PACKED
from utils.core.progress import Progress
from utils.data.batches import Batch, one_pass
from utils.data.images import ImageSet, Say

PART_BYTES = 1 << 28  # the largest size of the images in a part
BATCH = 64  # the number of images in a batch that is decoded


class PackedImages:
    """Reads and writes the packed images of an ImageSet, in the folder of the set's key. `read` returns only images
    whose part exists."""

    def __init__(self, images: ImageSet, folder: Path) -> None:
        self.folder = Path(folder)
        self.count, self.shape = len(images), (images.n_channels, images.img_size, images.img_size)
        self.bytes = int(np.prod(self.shape))
        self.part = max(1, PART_BYTES // self.bytes)
        self.crc = np.zeros(self.count, dtype="<u4")

    def parts(self) -> list[range]:
        """Return the ranges of images that share a file."""
        return [range(i, min(i + self.part, self.count)) for i in range(0, self.count, self.part)]

    def path(self, part: range) -> Path:
        return self.folder / f"part_{part.start:08d}.u8"

    def size(self, part: range) -> int:
        """Return the size of a part's file in bytes."""
        return len(part) * (self.bytes + self.crc.itemsize)

    def renew(self, now: dict[str, Any], say: Say) -> bool:
        """Remove the parts if their origin is not `now`, and store `now`. Only the main process calls this method.
        Returns False if the disk is not writable."""
        path = self.folder / "origin.json"
        parts = list(self.folder.glob("part_*.u8"))
        try:
            origin = read_json(path) if path.is_file() else None
        except DamagedFile:
            origin = "damaged"
        try:
            if not (parts and is_current(origin, now, self.folder, say, "packed images")):
                for part in parts:
                    part.unlink()
                write_json(path, now)
        except OSError as error:
            self.warn(error, say)
            return False
        return True

    def warn(self, error: OSError, say: Say) -> None:
        say(f"warning: the images cannot be packed into {self.folder} ({error.strerror}): they are decoded each time")

    def open(self, part: range) -> bool:
        """Read the CRCs of a part. Returns True if the part exists."""
        path = self.path(part)
        if not path.is_file() or path.stat().st_size != self.size(part):
            return False
        with open(path, "rb") as f:
            f.seek(len(part) * self.bytes)
            self.crc[part.start : part.stop] = np.frombuffer(f.read(), dtype=self.crc.dtype)
        return True

    def write(self, part: range, batches: Iterable[Batch]) -> None:
        """Write a part. batches: an iterable of (uint8 (B, C, H, W), numbers (B,)) of the part's good images, in
        order."""
        crc, next_one = np.zeros(len(part), dtype=self.crc.dtype), part.start
        with atomic_write(self.path(part)) as f:
            for x, numbers in batches:
                for image, i in zip(x, numbers.tolist(), strict=True):
                    data = image.numpy().tobytes()
                    f.write(bytes(self.bytes * (i - next_one)) + data)  # broken images before this image are zeros
                    crc[i - part.start], next_one = zlib.crc32(data), i + 1
            f.write(bytes(self.bytes * (part.stop - next_one)) + crc.tobytes())
        self.crc[part.start : part.stop] = crc

    def read(self, i: int) -> torch.Tensor | None:
        """Return image i, uint8 (C, H, W). Return None if the image is not packed, or if its bytes have changed."""
        if self.crc[i] == 0:
            return None
        first = i - i % self.part
        try:
            with open(self.path(range(first, first + 1)), "rb") as f:
                f.seek((i - first) * self.bytes)
                data = bytearray(f.read(self.bytes))
        except OSError:
            return None
        if len(data) != self.bytes or zlib.crc32(data) != self.crc[i]:
            return None
        return torch.frombuffer(data, dtype=torch.uint8).view(self.shape)


def pack(images: ImageSet, name: str, num_workers: int, say: Say) -> None:
    """Write the missing parts of an ImageSet's packed cache and let the set read from it. Several processes share the
    parts. name: the start of the folder's name.

    Raises UserError if the disk is too small. If the disk is not writable, the images stay unpacked, with a warning.
    """
    packed = PackedImages(images, PACKED / f"{name}_{hash_json(distributed.from_main(images.identity))}")
    if not distributed.from_main(lambda: packed.renew(images.origin(), say)):
        return
    try:
        _write_missing(packed, images, num_workers, say)
    except OSError as error:
        packed.warn(error, say)
    images.check_all_broken(say)
    for part in packed.parts():
        packed.open(part)
    images.packed = packed


def _write_missing(packed: PackedImages, images: ImageSet, num_workers: int, say: Say) -> None:
    own = packed.parts()[distributed.rank() :: distributed.world_size()]
    missing = [part for part in own if not packed.open(part)]
    if not missing:
        say(f"images read from {packed.folder}")
        return
    packed.folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(packed.folder, unused_for=ABANDONED)
    needed, free = sum(map(packed.size, missing)), shutil.disk_usage(packed.folder).free
    if needed > free:
        raise UserError(
            f"--cache_images needs {needed / 1e9:.1f} GB in {packed.folder}, and {free / 1e9:.1f} are free: free some "
            "space (that folder may be a link to another disk), or leave the flag out"
        )
    with Progress(len(images), "packing images", "img") as progress:  # the count assumes equally fast processes
        for done, part in enumerate(missing, start=len(own) - len(missing)):
            progress.skip_to(len(images) * done // len(own))
            packed.write(part, one_pass(images, BATCH, num_workers, positions=part, say=say))
        progress.update(len(images) - progress.done)
    say(f"images packed into {packed.folder}: {sum(map(packed.size, packed.parts())) / 1e9:.2f} GB")
