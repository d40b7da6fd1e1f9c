"""The cache of latent ids: what stage 2 trains on.

A file under latents/ holds ids (N, L) as int16 (int32 if the codebook has more than 32,768 codes), the positions of the
images that were left out because they could not be decoded, and a header of everything that the ids depend on: the
autoencoder's weights, the images, split and flip. It is never reused for another autoencoder. While a large set is
encoded, finished parts are stored next to it: a job that is killed loses at most one part.
"""

import contextlib
import functools
import glob
import math
import re
from pathlib import Path

import torch

from utils.core import cache, distributed
from utils.core.errors import DamagedFile
from utils.core.files import hash_json

LATENTS = Path("latents")
FORMAT = 2  # part of the header
PART = 1 << 14  # images in a part: minutes of work, a few megabytes
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def ids_type(codebook_size):
    """The integer type in which ids are stored."""
    return torch.int16 if codebook_size <= 1 << 15 else torch.int32


def cache_path(header):
    """latents/<dataset>_<split>_<key>[_flipped].pt; the key is a hash of the whole header."""
    suffix = "_flipped" if header["flip"] else ""
    return LATENTS / f"{header['dataset']}_{header['split']}_{hash_json(header)}{suffix}.pt"


def cached(header, images, codebook_size, batch_size, encode, say):
    """The ids of an ImageSet, from the cache of this header, or from encode() and then cached. Reports the images that
    were left out.

    header: its latent_shape gives the number of codes of an image. encode: positions (a range within
    range(len(images))) -> dict(ids=int (at most as many, L), left_out=positions int64 (n,)) of those images. All
    processes call it together, and the main process gets the result.
    """
    path, n = cache_path(header), len(images)
    origin = functools.cache(images.origin)
    fits = functools.partial(check, length=math.prod(header["latent_shape"]), codebook_size=codebook_size)

    def part(positions):
        place = path.with_name(f"{path.stem}.part{positions.start}-{positions.stop}")
        return cache.cached(
            place,
            dict(header, part=[positions.start, positions.stop]),
            lambda: encode(positions),
            say,
            "some of the codes",
            origin,
            lambda found: fits(place, found, positions),
        )

    def compute():
        size = PART // batch_size * batch_size or PART  # a multiple: the batches equal those of one pass
        ranges = [range(start, min(start + size, n)) for start in range(0, n, size)]
        if len(ranges) == 1:
            return encode(ranges[0])
        parts = [part(r) for r in ranges]
        if not distributed.is_main():
            return None
        none = torch.empty(0, dtype=torch.int64)
        left_out = torch.cat([p.get("left_out", none) for p in parts])
        return dict(ids=torch.cat([p["ids"] for p in parts]), left_out=left_out)

    found = cache.cached(
        path,
        header,
        compute,
        say,
        "codes",
        origin,
        lambda found: fits(path, found, range(n), most_missing=images.most_broken()),
    )
    images.leave_out(found and found.get("left_out"), n - len(found["ids"]) if found else 0, path, say)
    ids = distributed.broadcast_tensor(found and found["ids"])
    if distributed.is_main() and path.exists():  # otherwise only the parts hold the codes
        for place in _parts(path):
            with contextlib.suppress(OSError):
                place.unlink()
    return ids


def check(path, found, positions, length, codebook_size, most_missing=None):
    """Raises DamagedFile unless tensors that were read are what `cached` stores for a range of images.

    most_missing: how many of the images may be left out. This limit also holds for files of earlier versions, which do
    not list the missing images. None (for a part): any number may be missing, but the file must list them.
    """
    ids, left_out = found.get("ids"), found.get("left_out")
    if not torch.is_tensor(ids) or ids.dtype not in INTEGERS or ids.ndim != 2 or ids.shape[1] != length:
        raise DamagedFile(f"{path} holds no codes of shape (N, {length})")
    if ids.numel() and (ids.min() < 0 or ids.max() >= codebook_size):
        raise DamagedFile(f"{path} holds codes outside 0 ... {codebook_size - 1}")
    missing, complete = len(positions) - len(ids), most_missing is not None
    fits = 0 <= missing <= (most_missing if complete else len(positions))
    if left_out is None:
        fits = fits and (complete or missing == 0)
    else:
        fits = fits and cache.fits_range(left_out, missing, positions)
    if not fits:
        raise DamagedFile(f"{path} holds the codes of {len(ids)} images, not of {len(positions)}")


def _parts(path):
    return [p for p in path.parent.glob(f"{glob.escape(path.stem)}.part*") if re.fullmatch(r"\.part\d+-\d+", p.suffix)]
