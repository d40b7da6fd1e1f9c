"""The cache of latent ids: what stage 2 trains on.

A file under latents/ holds ids (N, L) in the smallest integer type and a header that says what made
them: the autoencoder's weights, the images, split and flip. Nothing is reused for another autoencoder.
While a large set is encoded, what is done is kept in parts beside it: a job that is killed loses one part.
"""

import contextlib
import glob
import re
from pathlib import Path

import torch

from utils import cache, distributed
from utils.io import hash_json

LATENTS = Path("latents")
FORMAT = 2  # part of the header
PART = 1 << 14  # images of a part: minutes of work, some megabytes


def cache_path(header):
    """latents/<dataset>_<split>_<key>[_flipped].pt; the key is a hash of the whole header."""
    suffix = "_flipped" if header["flip"] else ""
    return LATENTS / f"{header['dataset']}_{header['split']}_{hash_json(header)}{suffix}.pt"


def cached(header, n, batch_size, encode, say):
    """The ids of n images from the cache of this header, or from encode(), which are then cached.

    encode: positions (a range within range(n)) -> ids of those images, (up to as many, L); of several processes all
    call it together, and the main one has the result.
    """
    path = cache_path(header)

    def compute():
        size = max(1, PART // batch_size) * batch_size  # the batches are those of one pass over all
        ranges = [range(start, min(start + size, n)) for start in range(0, n, size)]
        if len(ranges) == 1:
            return dict(ids=encode(ranges[0]))
        parts = [_cached_part(path, header, r, encode, say) for r in ranges]
        return dict(ids=torch.cat([part["ids"] for part in parts])) if distributed.is_main() else None

    found = cache.cached(path, header, compute, say, "codes")
    ids = distributed.tensor_from_main(found and found["ids"])
    if distributed.is_main() and path.exists():  # else the parts are all there is
        for part in _parts(path):
            with contextlib.suppress(OSError):
                part.unlink()
    return ids


def _cached_part(path, header, positions, encode, say):
    header = dict(header, part=[positions.start, positions.stop])
    part = path.with_name(f"{path.stem}.part{positions.start}-{positions.stop}")
    return cache.cached(part, header, lambda: dict(ids=encode(positions)), say, "some of the codes")


def _parts(path):
    return [p for p in path.parent.glob(f"{glob.escape(path.stem)}.part*") if re.fullmatch(r"\.part\d+-\d+", p.suffix)]
