"""Priors over the codes, one file each.

To add one, add a file to this folder with a subclass of `Sampler` decorated by `@register("name")`.
`--sampler name` then finds it. Flags of its own are a literal FLAGS in the same file. No other file changes.
"""

from models.registry import import_files
from models.samplers.base import SAMPLERS, Sampler, register  # noqa: F401  (the package's interface)

import_files(__name__)
