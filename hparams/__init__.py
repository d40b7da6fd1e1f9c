"""Flags, defaults and presets, and the rules that resolve them to one configuration. The folder imports only the
standard library, modules of utils.core that do the same, and yaml when it is needed. `--help` is therefore fast."""

from hparams.config import sampler_family, vqgan_family  # noqa: F401
from hparams.resolve import get_hparams  # noqa: F401
