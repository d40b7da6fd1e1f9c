"""Priors over the codes, one file each.

To add one, add a file to this folder with a subclass of `Sampler` decorated by `@register("name")`.
`--sampler name` then finds it. Flags of its own are a literal FLAGS in the same file. No other file changes.
"""

import importlib
import pkgutil

from models.samplers.base import SAMPLERS, Sampler, register  # noqa: F401  (the package's interface)


def build_sampler(H):
    """The sampler that H.sampler names. Raises ValueError for an unknown name."""
    if H.sampler not in SAMPLERS:
        raise ValueError(f"--sampler {H.sampler} is unknown; there are: {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[H.sampler](H)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
