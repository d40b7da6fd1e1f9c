"""Vector quantizers, one file each.

To add one, add a file to this folder with a subclass of `Quantizer` decorated by `@register("name")`. `--quantizer
name` then selects it. Its own flags are a literal FLAGS in the same file. No other file changes.
"""

import torch

from models.quantizers.base import QUANTIZERS, Quantized, Quantizer, register  # noqa: F401  (the package's interface)
from models.registry import import_files

import_files(__name__)


def perplexity(counts):
    """exp(entropy) of code frequencies; counts (K,) -> () in [1, K]. The value is K if all codes are used equally."""
    p = counts.float() / counts.sum().clamp(min=1)
    return torch.exp(-torch.special.xlogy(p, p).sum())


def usage_figures(counts, prefix=""):
    """{name: number} that describe how many codes are used; counts (K,). {} if nothing was quantized yet."""
    if counts.sum() == 0:
        return {}
    return {f"{prefix}perplexity": float(perplexity(counts)), f"{prefix}codes_used": int((counts > 0).sum())}
