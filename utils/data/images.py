"""Sets of images: training and validation images, and images that cannot be decoded."""

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
SEARCH = 60.0  # seconds for the search for more broken images when a run stops
SKETCHED = 1000  # names in the first digest of a sketch, the only digest in manifests of earlier versions
SAMPLED = 64  # images whose contents are compared when a cache is read

Say = Callable[[str], None]


class ImageSet(Dataset):
    """Some images of a source, decoded to img_size. All workers share it.

    The process that finds a broken image marks it in `broken` (shared memory). The iterators of utils.data.batches
    report broken images. In training, the next good image replaces a broken one, so that batches stay full.
    """

    def __init__(self, source: Source, indices: Iterable[int], img_size: int, n_channels: int = 3) -> None:
        self.source, self.indices = source, np.asarray(indices)
        self.img_size, self.n_channels = img_size, n_channels
        self.view: tuple[float, int] | None = None  # see cropped
        self.packed: Any = None  # utils.data.packed.PackedImages, if there is a cache of decoded images
        self.broken = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()
        self._reported: set[int] = set()
        self._known_to_all = 0  # the number of broken images that every process of the job knows

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return self.source.name(self.indices[i])

    def cropped(self, least: float, number: int) -> ImageSet:
        """The set with a random crop in place of each image: the `number`-th, of at least this share of its area."""
        result = copy.copy(self)  # the copy shares `broken` with this set
        result.view = least, number
        return result

    def load(self, i: int, crop: Crop | None = None) -> torch.Tensor | None:
        """Image i or a crop of it, uint8 (C, H, W); None if it cannot be decoded."""
        if self.view is not None:
            least, number = self.view
            crop = Crop(least, derive_seed("view", number, i))
        if crop is None and self.packed is not None and (image := self.packed.read(i)) is not None:
            return image
        try:
            return decode(self.source.read(self.indices[i]), self.img_size, self.n_channels, crop)
        except UserError:
            raise  # the disk, the network or the data set cannot be read
        except Exception:  # Pillow's readers raise many types, and one bad file must not end a run
            self.broken[i] = True
            return None

    def __getitem__(self, key: Any) -> tuple[Any, int]:
        """key (i, flip) or (i, flip, crop) -> (image, i) with a replacement for a broken image; key i -> (image or
        None, i). crop: a Crop or None."""
        if not isinstance(key, tuple):
            return None if self.broken[key] else self.load(key), key
        i, flip, *crop = key
        for offset in range(self.most_broken() + 1):
            j = (i + offset) % len(self)
            image = None if self.broken[j] else self.load(j, *crop)
            if image is not None:
                return (image.flip(-1) if flip else image), j
        raise UserError(self._too_many())  # the iterator then calls check_broken, which names the images

    # ------------------------------------------------------------------ broken images

    def most_broken(self) -> int:
        """The number of images that may be broken."""
        return int(MAX_BROKEN_SHARE * len(self))

    def _too_many(self) -> str:
        first = self.name(int(self.broken.numpy().argmax()))
        return (
            f"{self._count_broken()} of {len(self)} images cannot be decoded, {first!r} among them; "
            "at most 5% may be broken: remove or repair them"
        )

    def _count_broken(self) -> int:
        return int(np.count_nonzero(self.broken.numpy()))  # 0.2 ms for 3 million; torch.sum takes 4 ms

    def check_broken(self, say: Say) -> None:
        """Report new broken images through `say`. If more than 5% of the images are broken, search for more of them for
        up to SEARCH seconds, report these, and raise UserError."""
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
            say(f"there may be others: the search for them ended after {SEARCH:.0f} seconds")
        raise UserError(self._too_many())

    def _report(self, say: Say, most: int) -> int:
        """Name the broken images that were not reported yet, up to `most` in total. Returns the number of those that
        are not named."""
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
        """check_broken with the broken images that any process has found. All processes call it."""
        if distributed.all_reduce_max(int(self._count_broken() != self._known_to_all)):
            self.broken.copy_(distributed.all_reduce_sum(self.broken.int()) > 0)
            self._known_to_all = self._count_broken()
        self.check_broken(say)

    def left_out(self, positions: range) -> torch.Tensor:
        """The positions of the broken images in a range, int64 (n,)."""
        return positions.start + self.broken[positions.start : positions.stop].nonzero().flatten()

    def leave_out(self, left_out: torch.Tensor | None, missing: int, path: Path, say: Say) -> None:
        """Mark the images that a cache does not contain as broken, and report them. All processes call it.

        left_out: the positions of these images, int64 (n,), in the main process; None in the others. Also None for a
        cache of an earlier version, which does not list the images. missing: the number of images.
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
        """JSON values that identify the images and their decoding, for the keys of caches."""
        return dict(
            source=self.source.identity(),
            indices=hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest(),
            img_size=self.img_size,
            n_channels=self.n_channels,
            resize="short side, bilinear, centre crop" if self.view is None else ["random crop", *self.view],
        )

    def origin(self) -> dict[str, Any]:
        """JSON values that are compared when a cache is read: see utils.core.cache.is_current."""
        digest = hashlib.sha256()
        for i in evenly_spaced(min(SAMPLED, len(self)), len(self)):
            digest.update(hashlib.sha256(self.source.sample(self.indices[i])).digest())
        return dict(contents=digest.hexdigest(), versions=versions("Pillow"))

    def _file_names(self, positions: Iterable[int]) -> Iterator[str]:
        return (os.path.basename(self.name(i)) for i in positions)

    def sketch(self) -> dict[str, Any]:
        """The number of images and digests of their names. A different set has a different sketch; the same set in
        another folder has the same one."""
        n = len(self)
        sketch = dict(count=n, names=hash_json(list(self._file_names(evenly_spaced(min(SKETCHED, n), n)))))
        if n > SKETCHED:
            digest = hashlib.sha256()
            for name in self._file_names(range(n)):
                digest.update(f"{name!a}\n".encode())
            sketch["all_names"] = digest.hexdigest()
        return sketch

    def evenly(self, n: int) -> ImageSet:
        """An ImageSet of n of these images, evenly spaced."""
        return ImageSet(self.source, self.indices[evenly_spaced(n, len(self))], self.img_size, self.n_channels)


def evenly_spaced(count: int, n: int) -> np.ndarray:
    """`count` evenly spaced positions in range(n), int64 (count,)."""
    return np.linspace(0, n, count, endpoint=False).astype(np.int64)


def fixed_images(images: ImageSet, count: int, say: Say = say) -> torch.Tensor:
    """Up to `count` evenly spaced images of the set, uint8 (n, C, H, W), the same at each call. The next good image
    replaces a broken one. All processes call it."""
    spread = evenly_spaced(min(count, len(images)), len(images))
    try:
        chosen = torch.stack([images[i, False][0] for i in spread.tolist()])
    except UserError:
        images.check_all_broken(say)  # if too many images are broken, this names them
        raise
    images.check_all_broken(say)
    return chosen


# ---------------------------------------------------------------------- splits


def split_sizes(n: int) -> tuple[int, int]:
    """(number of training images, number of validation images) of n images: 5%, at least one, are for validation."""
    n_val = max(round(n * VALIDATION_SHARE), 1)
    return n - n_val, n_val


def held_out(source: Source, rule: str) -> np.ndarray:
    """A mask of the validation images of a source, bool (n,).

    rule: "hash": the images whose split_keys have the lowest SHA-256. Each large subfolder then has about 5%. A set
    that is moved keeps its validation images; a set that grows keeps almost all of them. "last": the last images, which
    is the rule of earlier versions.
    """
    n_train, n_val = split_sizes(len(source))
    if rule == "last":
        return np.arange(len(source)) >= n_train
    beginnings = (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in source.split_keys())
    hashes = np.fromiter(beginnings, dtype=np.uint64, count=len(source))  # 8 of 32 bytes: enough to tell them apart
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
    """The ImageSet of a split, 'train' or 'val', of a datasets.yaml entry (hparams.sources.dataset_entry).

    If a set has validation images of its own, these are used. Otherwise 5% are validation images, chosen by split_rule
    (see held_out), and the others are training images. With hold_out False, all images are training images. unique: see
    utils.data.sources.open_source.
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
