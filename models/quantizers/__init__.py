"""Vector quantizers. Each quantizer has a file of its own.

To add a quantizer, add a file to this folder with a subclass of `Quantizer` decorated by `@register("name")`.
`--quantizer name` then selects the quantizer. The literal FLAGS in the same file declares the flags of the quantizer.
No other file changes.
"""

import torch

from models.quantizers.base import QUANTIZERS, Quantized, Quantizer, register  # noqa: F401  (the package's interface)
from models.registry import import_files

import_files(__name__)


def perplexity(counts):
    """Return exp(entropy) of code frequencies; counts (K,) -> () in [1, K]. Equal use of all codes gives K."""
    p = counts.float() / counts.sum().clamp(min=1)
    return torch.exp(-torch.special.xlogy(p, p).sum())


def usage_figures(counts, prefix=""):
    """Return {name: number} about the use of the codes, from counts (K,). Return {} if nothing was quantized yet."""
    if counts.sum() == 0:
        return {}
    return {f"{prefix}perplexity": float(perplexity(counts)), f"{prefix}codes_used": int((counts > 0).sum())}
