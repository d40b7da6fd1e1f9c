"""Defines sets of images, divides them into training and validation images, and reports images that cannot be
decoded."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.core import distributed
from utils.core.cache import versions
from utils.core.errors import UserError
from utils.core.files import hash_json
from utils.core.progress import say
from utils.core.seed import derive_seed
from utils.data.decoding import Crop, decode
from utils.data.sources import Source, open_source

MAX_BROKEN_SHARE = 0.05
VALIDATION_SHARE = 0.05
MAX_NAMED = 100  # broken images that are reported by name while a run continues
MAX_LISTED = 1000  # broken images that are reported by name when a run stops because of them
SEARCH = 60.0  # seconds; the longest search for more broken images when a run stops
SKETCHED = 1000  # names in the first digest of a sketch; manifests of earlier versions have only this digest
SAMPLED = 64  # the number of images whose contents are compared when a cache is read

Say = Callable[[str], None]


class ImageSet(Dataset):
    """A set of images of one source, which are decoded to img_size. All workers share the set.

    The process that finds a broken image marks it in `broken` (shared memory). The iterators of utils.data.batches
    report broken images. In training, the next good image replaces a broken one, so that batches stay full.
    """

    def __init__(self, source: Source, indices: Iterable[int], img_size: int, n_channels: int = 3) -> None:
        self.source, self.indices = source, np.asarray(indices)
        self.img_size, self.n_channels = img_size, n_channels
        self.view: tuple[float, int] | None = None  # (least, number) of the random crops, set by cropped()
        self.packed: Any = None  # a utils.data.packed.PackedImages if decoded images are cached
        self.broken = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()
        self._reported: set[int] = set()
        self._known_to_all = 0  # the number of broken images that all processes of the job know

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """Return the name of image i in messages."""
        return self.source.name(self.indices[i])

    def cropped(self, least: float, number: int) -> ImageSet:
        """Return a copy of the set with one random crop in place of each image. least: the smallest share of the
        image's area. number: the crops of different numbers differ."""
        result = copy.copy(self)  # the copy shares `broken` with this set
        result.view = least, number
        return result

    def load(self, i: int, crop: Crop | None = None) -> torch.Tensor | None:
        """Return image i or a crop of the image, uint8 (C, H, W). Return None if the image cannot be decoded."""
        if self.view is not None:
            least, number = self.view
            crop = Crop(least, derive_seed("view", number, i))
        if crop is None and self.packed is not None and (image := self.packed.read(i)) is not None:
            return image
        try:
            return decode(self.source.read(self.indices[i]), self.img_size, self.n_channels, crop)
        except UserError:
            raise  # UserError means that the disk, the network or the data set cannot be read
        except Exception:  # Pillow's readers raise many types; a bad file must not end a run
            self.broken[i] = True
            return None

    def __getitem__(self, key: Any) -> tuple[Any, int]:
        """For a key (i, flip) or (i, flip, crop), return (image, position). A broken image is replaced by the next good
        image. For a key i, return (image, i) or, if the image is broken, (None, i). crop: a Crop or None."""
        if not isinstance(key, tuple):
            return None if self.broken[key] else self.load(key), key
        i, flip, *crop = key
        for offset in range(self.most_broken() + 1):
            j = (i + offset) % len(self)
            image = None if self.broken[j] else self.load(j, *crop)
            if image is not None:
                return (image.flip(-1) if flip else image), j
        raise UserError(self._too_many())  # the iterator then calls check_broken to name the images

    # ------------------------------------------------------------------ broken images

    def most_broken(self) -> int:
        """Return the number of images that may be broken."""
        return int(MAX_BROKEN_SHARE * len(self))

    def _too_many(self) -> str:
        first = self.name(int(self.broken.numpy().argmax()))
        return (
            f"{self._count_broken()} of {len(self)} images cannot be decoded, {first!r} among them; "
            "at most 5% may be broken: remove or repair them"
        )

    def _count_broken(self) -> int:
        return int(np.count_nonzero(self.broken.numpy()))  # 3 million images take 0.2 ms; torch.sum would take 4 ms

    def check_broken(self, say: Say) -> None:
        """Report new broken images through `say`. If more than 5% of the images are broken, search for more broken
        images for up to SEARCH seconds, report them, and raise UserError."""
        count = self._count_broken()
        if count == len(self._reported):
            return
        if count <= self.most_broken():
            self._report(say, MAX_NAMED)
            return
        say(f"too many images cannot be decoded: looking for all of them, {SEARCH:.0f} seconds at most")
        complete = self._find_all()
        left = self._report(say, MAX_LISTED)
        if left:
            say(f"skipped: {left} more that cannot be decoded")
        if not complete:
            say(f"more images may be broken: the search ended after {SEARCH:.0f} seconds")
        raise UserError(self._too_many())

    def _report(self, say: Say, most: int) -> int:
        """Name the broken images that were not reported yet. At most `most` images are named in total. Returns the
        number of broken images without a name in a message."""
        for i in self.broken.nonzero().flatten().tolist():
            if i not in self._reported and len(self._reported) < most:
                say(f"skipped: {self.name(i)!r} cannot be decoded")
            self._reported.add(i)
        return max(0, len(self._reported) - most)

    def _find_all(self) -> bool:
        """Decode the images to find all broken ones. Returns False if SEARCH seconds are not enough."""
        end = time.monotonic() + SEARCH
        for i in range(len(self)):
            if time.monotonic() > end:
                return False
            if not self.broken[i]:
                self.load(i)
        return True

    def check_all_broken(self, say: Say) -> None:
        """Call check_broken with the broken images that any process has found. All processes call this method."""
        if distributed.all_reduce_max(int(self._count_broken() != self._known_to_all)):
            self.broken.copy_(distributed.all_reduce_sum(self.broken.int()) > 0)
            self._known_to_all = self._count_broken()
        self.check_broken(say)

    def left_out(self, positions: range) -> torch.Tensor:
        """Return the positions of the broken images in a range, int64 (n,)."""
        return positions.start + self.broken[positions.start : positions.stop].nonzero().flatten()

    def leave_out(self, left_out: torch.Tensor | None, missing: int, path: Path, say: Say) -> None:
        """Mark the images that a cache does not contain as broken, and report them. All processes call this method.

        left_out: the positions of these images, int64 (n,), in the main process. In the other processes left_out is
        None. A cache of an earlier version does not list the images; for such a cache left_out is None, too. missing:
        the number of images that the cache does not contain.
        """
        if left_out is not None:
            self.broken[left_out] = True
        elif missing:
            say(
                f"note: {path} was made without {missing} of {len(self)} images, which could not be read or decoded; "
                "remove it to try again"
            )
        self.check_all_broken(say)

    # ------------------------------------------------------------------ identity

    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify the images and their decoding. Keys of caches contain these values."""
        return dict(
            source=self.source.identity(),
            indices=hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest(),
            img_size=self.img_size,
            n_channels=self.n_channels,
            resize="short side, bilinear, centre crop" if self.view is None else ["random crop", *self.view],
        )

    def origin(self) -> dict[str, Any]:
        """Return JSON values that are compared when a cache is read (see utils.core.cache.is_current)."""
        digest = hashlib.sha256()
        for i in evenly_spaced(min(SAMPLED, len(self)), len(self)):
            digest.update(hashlib.sha256(self.source.sample(self.indices[i])).digest())
        return dict(contents=digest.hexdigest(), versions=versions("Pillow"))

    def _file_names(self, positions: Iterable[int]) -> Iterator[str]:
        return (os.path.basename(self.name(i)) for i in positions)

    def sketch(self) -> dict[str, Any]:
        """Return the number of images and digests of their names. Different sets have different sketches. If a set is
        moved to another folder, its sketch stays the same."""
        n = len(self)
        sketch = dict(count=n, names=hash_json(list(self._file_names(evenly_spaced(min(SKETCHED, n), n)))))
        if n > SKETCHED:
            digest = hashlib.sha256()
            for name in self._file_names(range(n)):
                digest.update(f"{name!a}\n".encode())
            sketch["all_names"] = digest.hexdigest()
        return sketch

    def evenly(self, n: int) -> ImageSet:
        """Return an ImageSet of n evenly spaced images of this set."""
        return ImageSet(self.source, self.indices[evenly_spaced(n, len(self))], self.img_size, self.n_channels)


def evenly_spaced(count: int, n: int) -> np.ndarray:
    """Return `count` evenly spaced positions in range(n), int64 (count,)."""
    return np.linspace(0, n, count, endpoint=False).astype(np.int64)


def fixed_images(images: ImageSet, count: int, say: Say = say) -> torch.Tensor:
    """Return up to `count` evenly spaced images of the set, uint8 (n, C, H, W). Each call returns equal images. The
    next good image replaces a broken image. All processes call this function."""
    spread = evenly_spaced(min(count, len(images)), len(images))
    try:
        chosen = torch.stack([images[i, False][0] for i in spread.tolist()])
    except UserError:
        images.check_all_broken(say)  # if too many images are broken, this call names them
        raise
    images.check_all_broken(say)
    return chosen


# ---------------------------------------------------------------------- splits


def split_sizes(n: int) -> tuple[int, int]:
    """Return (number of training images, number of validation images) for n images. 5% of the images, but at least one,
    are validation images."""
    n_val = max(round(n * VALIDATION_SHARE), 1)
    return n - n_val, n_val


def held_out(source: Source, rule: str) -> np.ndarray:
    """Return a mask of the validation images of a source, bool (n,).

    With the rule "hash", the validation images are those whose split_keys have the lowest SHA-256. About 5% of each
    large subfolder are then validation images. A set that is moved keeps its validation images, and a set that grows
    keeps almost all of them. With the rule "last", which earlier versions used, the last images are the validation
    images.
    """
    n_train, n_val = split_sizes(len(source))
    if rule == "last":
        return np.arange(len(source)) >= n_train
    beginnings = (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in source.split_keys())
    hashes = np.fromiter(beginnings, dtype=np.uint64, count=len(source))  # 8 of 32 bytes distinguish the keys
    held = np.zeros(len(source), dtype=bool)
    held[hashes.argsort(kind="stable")[:n_val]] = True
    return held


def open_images(
    entry: dict[str, Any],
    split: str,
    img_size: int,
    n_channels: int = 3,
    hold_out: bool = True,
    unique: bool = True,
    split_rule: str = "hash",
) -> ImageSet:
    """Return the ImageSet of a split ('train' or 'val') of a datasets.yaml entry (see hparams.sources.dataset_entry).

    If a set has validation images of its own, these are used. Otherwise split_rule chooses 5% of the images as
    validation images (see held_out), and the remaining images are training images. With hold_out=False, all images are
    training images. unique: see utils.data.sources.open_source.
    """
    own_validation = open_source(entry, "val", unique)
    source = own_validation if split == "val" else None
    divided = source is None and own_validation is None and (hold_out or split == "val")
    if source is None:
        source = open_source(entry, "train", unique)
        assert source is not None, "only validation images may be missing"
    distributed.must_agree(source.enumeration, f"the list of images ({entry['origin']})")
    indices = np.arange(len(source))
    if divided:
        indices = indices[held_out(source, split_rule) == (split == "val")]
    if len(indices) == 0:
        raise UserError(
            f"{entry['origin']}: {len(source)} image(s) leave none for '{split}' when some train and others "
            "validate (--steps_per_eval): add images"
        )
    return ImageSet(source, indices, img_size, n_channels)
