"""Builds the models from a configuration H. The arguments of a model's constructor are fields of H with the same names;
a quantizer or sampler gets its own flags in this way. Only this file depends on this rule."""

import inspect

from models.autoencoder import Encoder, Generator, VQAutoEncoder
from models.discriminator import Discriminator
from models.quantizers import QUANTIZERS
from models.samplers import SAMPLERS
from models.transformer import TransformerConfig
from models.vqgan import VQGAN


def from_fields(cls, fields):
    """An instance of cls; the arguments of its constructor are taken from the dictionary `fields` by name. Those that
    have a default may be missing."""
    parameters = inspect.signature(cls).parameters.values()
    return cls(**{p.name: fields[p.name] for p in parameters if p.name in fields or p.default is p.empty})


def build_autoencoder(H):
    """The VQAutoEncoder with the quantizer that H.quantizer names."""
    # The order of construction decides which random numbers initialise each part.
    return VQAutoEncoder(*(from_fields(cls, vars(H)) for cls in (Encoder, QUANTIZERS[H.quantizer], Generator)))


def build_vqgan(H, perceptual=None):
    """All networks of stage 1. perceptual: LPIPS, or None if its weight is 0."""
    return VQGAN(build_autoencoder(H), from_fields(Discriminator, vars(H)), perceptual)


def build_sampler(H):
    """The sampler that H.sampler names. Its constructor's argument `transformer`, if any, is a TransformerConfig."""
    transformer = from_fields(TransformerConfig, vars(H))
    return from_fields(SAMPLERS[H.sampler], dict(vars(H), transformer=transformer))
