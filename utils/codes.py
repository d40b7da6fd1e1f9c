"""The cache of latent ids: what stage 2 trains on.

A file under latents/ holds ids (N, L) in the smallest integer type and a header that says what made
them: the autoencoder's weights, the images, split and flip. A header that differs means another file;
nothing is reused for another autoencoder.
"""

import hashlib
from pathlib import Path

import torch

from utils.errors import DamagedFile
from utils.io import hash_json, load_tensors, save_tensors

LATENTS = Path("latents")
FORMAT = 1


def ids_hash(ids):
    return hashlib.sha256(ids.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def cache_path(header):
    """latents/<dataset>_<split>_<key>[_flipped].pt; the key is a hash of the whole header."""
    suffix = "_flipped" if header["flip"] else ""
    return LATENTS / f"{header['dataset']}_{header['split']}_{hash_json(header)}{suffix}.pt"


def read(header):
    """The cached ids (N, L) of this header, or None. Raises DamagedFile for a file that does not hold them."""
    path = cache_path(header)
    if not path.exists():
        return None
    value = load_tensors(path)
    try:
        ids, found, digest = value["ids"], value["header"], value["sha256"]
        if value["format"] != FORMAT or found != header or ids.ndim != 2 or ids_hash(ids) != digest:
            raise DamagedFile(f"{path} does not hold what its name says")
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise DamagedFile(f"{path} is damaged: not a cache of codes") from None
    return ids


def write(header, ids):
    """Store ids (N, L) under this header; complete or absent."""
    save_tensors(cache_path(header), dict(format=FORMAT, header=header, ids=ids, sha256=ids_hash(ids)))
    return cache_path(header)


def cached(header, compute, say):
    """The ids of this header from the cache, or from compute(), which is then cached."""
    try:
        ids = read(header)
    except DamagedFile as error:
        say(f"warning: {error}; the codes are computed again")
        ids = None
    if ids is None:
        ids = compute()
        say(f"codes cached in {write(header, ids)}")
    else:
        say(f"codes read from {cache_path(header)}")
    return ids
