"""The cache of latent ids: what stage 2 trains on.

A file under latents/ holds ids (N, L) in the smallest integer type and a header that says what made
them: the autoencoder's weights, the images, split and flip. Nothing is reused for another autoencoder.
"""

from pathlib import Path

from utils import cache
from utils.io import hash_json

LATENTS = Path("latents")
FORMAT = 2  # part of the header


def cache_path(header):
    """latents/<dataset>_<split>_<key>[_flipped].pt; the key is a hash of the whole header."""
    suffix = "_flipped" if header["flip"] else ""
    return LATENTS / f"{header['dataset']}_{header['split']}_{hash_json(header)}{suffix}.pt"


def cached(header, compute, say):
    """The ids (N, L) of this header from the cache, or from compute(), which is then cached."""
    return cache.cached(cache_path(header), header, lambda: dict(ids=compute()), say, "codes")["ids"]
