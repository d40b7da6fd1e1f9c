"""Caches latent ids, which are the training data of stage 2.

A file under latents/ holds ids (N, L), the positions of images that could not be decoded, and a header. The ids are
int16, or int32 if the codebook has more than 32,768 codes. The header states everything that the ids depend on (the
autoencoder's weights, the images, split and flip). A file is never reused for another autoencoder. While a large set is
encoded, finished parts are stored next to the file. Therefore a killed job loses at most one part.
"""

import contextlib
import functools
import glob
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from utils.core import cache, distributed
from utils.core.errors import DamagedFile
from utils.core.files import hash_json
from utils.core.job import LATENTS
from utils.data.images import ImageSet, Say

Tensors = dict[str, torch.Tensor]
Encode = Callable[[range], Iterator[torch.Tensor]]
FORMAT = 2  # the version of the file format, stored in the header
PART = 1 << 14  # images in a part; encoding a part takes minutes, and its file has a few megabytes
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def ids_type(codebook_size: int) -> torch.dtype:
    """Return the integer type in which ids are stored."""
    return torch.int16 if codebook_size <= 1 << 15 else torch.int32


def cache_path(header: dict[str, Any]) -> Path:
    """Return the path latents/<dataset>_<split>_<key>[_flipped].pt. The key is a hash of the whole header."""
    suffix = "_flipped" if header["flip"] else ""
    return LATENTS / f"{header['dataset']}_{header['split']}_{hash_json(header)}{suffix}.pt"


def cached(
    header: dict[str, Any],
    images: ImageSet,
    codebook_size: int,
    batch_size: int,
    encode: Encode,
    say: Say,
) -> torch.Tensor:
    """Return the ids (N, L) of an ImageSet. The ids are read from the cache of this header, or computed by encode() and
    then cached. The images that were left out are reported. All processes call this function together, and all get the
    result.

    header: JSON values; `latent_shape` gives the number of codes of an image. encode: a function of a range of
    positions. encode returns an iterator over the ids (b, L) of these images in order, in batches of batch_size images.
    The iterator yields results in the main process only.
    """
    codes = CodeCache(header, images, codebook_size, encode, say)
    found = codes.read_or_encode(batch_size)  # None except in the main process
    left_out = found.get("left_out") if found else None
    images.leave_out(left_out, len(images) - len(found["ids"]) if found else 0, codes.path, say)
    ids = distributed.broadcast_tensor(found and found["ids"])
    if distributed.is_main() and codes.path.exists():  # remove the parts only if the complete file exists
        codes.remove_parts()
    return ids


class CodeCache:
    """Reads and writes the file of a header, and the parts next to this file. The arguments are those of `cached`."""

    def __init__(self, header: dict[str, Any], images: ImageSet, codebook_size: int, encode: Encode, say: Say) -> None:
        self.header, self.images, self.codebook_size, self.encode, self.say = header, images, codebook_size, encode, say
        self.path = cache_path(header)
        self.length = math.prod(header["latent_shape"])
        self._origin = functools.cache(images.origin)

    def read_or_encode(self, batch_size: int) -> Tensors | None:
        """Return the ids, and the positions of the images that were left out. Only the main process gets them; the
        other processes get None."""
        n = len(self.images)
        check = functools.partial(self.check, self.path, range(n), self.images.most_broken())
        encode = functools.partial(self._encode_in_parts, n, batch_size)
        return cache.cached(self.path, self.header, encode, self.say, "codes", self._origin, check)

    def _encode_in_parts(self, n: int, batch_size: int) -> Tensors | None:
        size = PART // batch_size * batch_size or PART  # whole batches, so that parts change no batch
        parts = [range(start, min(start + size, n)) for start in range(0, n, size)]
        if len(parts) == 1:
            return self._encode(parts[0])
        found = [self._part(positions) for positions in parts]
        if not distributed.is_main():
            return None
        none = torch.empty(0, dtype=torch.int64)
        left_out = torch.cat([part.get("left_out", none) for part in found])
        return dict(ids=torch.cat([part["ids"] for part in found]), left_out=left_out)

    def _part(self, positions: range) -> Tensors:
        path = self.path.with_name(f"{self.path.stem}.part{positions.start}-{positions.stop}")
        header = dict(self.header, part=[positions.start, positions.stop])
        check = functools.partial(self.check, path, positions, None)
        encode = functools.partial(self._encode, positions)
        return cache.cached(path, header, encode, self.say, "some of the codes", self._origin, check)

    def _encode(self, positions: range) -> Tensors:
        nothing = torch.empty(0, self.length, dtype=ids_type(self.codebook_size))  # all images may be broken
        ids = torch.cat([nothing, *self.encode(positions)])
        return dict(ids=ids, left_out=self.images.left_out(positions))

    def check(self, path: Path, positions: range, most_missing: int | None, found: Tensors) -> None:
        """Raise DamagedFile unless the tensors of a file can be the codes of a range of images.

        most_missing: the number of images that may be left out. This limit also holds for files of earlier versions,
        which do not list the missing images. With None (for a part), any number may be missing, but the file must list
        the missing images.
        """
        ids, left_out = found.get("ids"), found.get("left_out")
        if not torch.is_tensor(ids) or ids.dtype not in INTEGERS or ids.ndim != 2 or ids.shape[1] != self.length:
            raise DamagedFile(f"{path} holds no codes of shape (N, {self.length})")
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.codebook_size):
            raise DamagedFile(f"{path} holds codes outside 0 ... {self.codebook_size - 1}")
        missing = len(positions) - len(ids)
        fits = 0 <= missing <= (len(positions) if most_missing is None else most_missing)
        if left_out is not None:
            fits = fits and cache.fits_range(left_out, missing, positions)
        elif most_missing is None:
            fits = missing == 0
        if not fits:
            raise DamagedFile(f"{path} holds the codes of {len(ids)} images, not of {len(positions)}")

    def remove_parts(self) -> None:
        for place in self.path.parent.glob(f"{glob.escape(self.path.stem)}.part*"):
            if re.fullmatch(r"\.part\d+-\d+", place.suffix):
                with contextlib.suppress(OSError):
                    place.unlink()
