"""Vector quantizers, one file each.

To add one: put a file beside this one with a class decorated by `@register("name")`, built from the
configuration H, that offers forward, encode and embed_ids as `nearest.py` does. `--quantizer name`
finds it: no other file changes.
"""

import importlib
import pkgutil
from dataclasses import dataclass

import torch

_REGISTRY = {}


@dataclass
class Quantized:
    """What a quantizer returns.

    z_q (B, E, h, w): the quantized latents, differentiable with respect to z;
    loss (): the codebook loss; ids (B, h, w) int64: the chosen codes (None where nothing was quantized);
    mean_distance (): mean squared distance to all codes (0 where it has no meaning).
    """

    z_q: torch.Tensor
    loss: torch.Tensor
    ids: torch.Tensor | None
    mean_distance: torch.Tensor


def register(name):
    """Class decorator: make the quantizer available as `--quantizer name`."""

    def add(cls):
        _REGISTRY[name] = cls
        return cls

    return add


def build_quantizer(H):
    """The quantizer that H.quantizer names. Raises ValueError for an unknown name."""
    if H.quantizer not in _REGISTRY:
        raise ValueError(f"--quantizer {H.quantizer} is unknown; there are: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[H.quantizer](H)


def perplexity(counts):
    """exp(entropy) of code frequencies; counts (K,) -> () in [1, K]. K means all codes equally used."""
    p = counts.float() / counts.sum().clamp(min=1)
    return torch.exp(-torch.special.xlogy(p, p).sum())


def usage_figures(counts, prefix=""):
    """How well the codebook is used, from counts (K,); nothing where nothing was quantized yet."""
    if counts.sum() == 0:
        return {}
    return {f"{prefix}perplexity": float(perplexity(counts)), f"{prefix}codes_used": int((counts > 0).sum())}


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
