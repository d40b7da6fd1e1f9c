"""Builds the models from a configuration H. Each argument of a model's constructor is the field of H with the same
name. A quantizer or sampler also gets its own flags by this rule. Only this file depends on the rule."""

import inspect

from models.autoencoder import Encoder, Generator, VQAutoEncoder
from models.discriminator import Discriminator
from models.quantizers import QUANTIZERS
from models.samplers import SAMPLERS
from models.transformer import TransformerConfig
from models.vqgan import VQGAN


def from_fields(cls, fields):
    """Make an instance of cls. The dictionary `fields` gives the arguments of the constructor by name."""
    return cls(**{name: fields[name] for name in inspect.signature(cls).parameters})


def build_autoencoder(H):
    """Build the VQAutoEncoder with the quantizer that H.quantizer names."""
    # The order of construction decides which random numbers initialise each part.
    return VQAutoEncoder(*(from_fields(cls, vars(H)) for cls in (Encoder, QUANTIZERS[H.quantizer], Generator)))


def build_vqgan(H, perceptual=None):
    """Build all networks of stage 1. perceptual: the perceptual distance, or None if its weight is 0."""
    return VQGAN(build_autoencoder(H), from_fields(Discriminator, vars(H)), perceptual)


def build_sampler(H):
    """Build the sampler that H.sampler names. A constructor's argument `transformer` gets a TransformerConfig."""
    transformer = from_fields(TransformerConfig, vars(H))
    return from_fields(SAMPLERS[H.sampler], dict(vars(H), transformer=transformer))
