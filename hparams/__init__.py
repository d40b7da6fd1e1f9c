"""Hyperparameters: the flags, their defaults, presets by data set, and how they are resolved.

Standard library only (and yaml, once there is something to resolve), so that `--help` answers at once.
"""

from hparams.resolve import get_hparams, sampler_family, vqgan_family  # noqa: F401
