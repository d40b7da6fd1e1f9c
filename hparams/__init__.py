"""Hyperparameters: flags, defaults, presets, and how they are resolved. Imports the standard library (yaml late) and
modules of utils.core that do the same, so that `--help` is fast."""

from hparams.config import sampler_family, vqgan_family  # noqa: F401
from hparams.resolve import get_hparams  # noqa: F401
