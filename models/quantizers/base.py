"""What every quantizer offers. B images, E = emb_dim, h x w latents, K = codebook_size."""

from dataclasses import dataclass

import torch
from torch import nn

QUANTIZERS = {}


def register(name):
    """Class decorator: make the quantizer available as `--quantizer name`."""

    def add(cls):
        QUANTIZERS[name] = cls
        return cls

    return add


@dataclass
class Quantized:
    """What `Quantizer.forward` returns.

    z_q (B, E, h, w): the quantized latents, differentiable with respect to z;
    loss (): the codebook loss, with a gradient; ids (B, h, w) int64: the chosen codes (None if nothing was quantized);
    mean_distance (): mean squared distance to all codes (0 if it has no meaning).
    """

    z_q: torch.Tensor
    loss: torch.Tensor
    ids: torch.Tensor | None
    mean_distance: torch.Tensor


class Quantizer(nn.Module):
    """Turns latents into codes and codes into vectors. Built from the configuration H.

    Subclasses implement `forward`, `encode` and `embed_ids`. A subclass with a `start_step` also implements
    `place_codes` and `codebook_weight`; one with `restart_steps` implements `restart_codes` and `codebook_weight`.
    """

    # The step from which forward quantizes. If it is not 0, training calls place_codes at the start of this step.
    start_step = 0
    # Steps between calls of restart_codes in training; 0: never.
    restart_steps = 0

    def __init__(self, H):
        super().__init__()
        self.codebook_size = H.codebook_size

    def forward(self, z, step=None, rng=None):
        """Latents z (B, E, h, w) -> Quantized.

        step: the training step; None: as after training. rng: utils.core.seed.StepRandom, the source of all
        randomness of a training step; None: the global generator.
        """
        raise NotImplementedError

    def encode(self, z):
        """Latents z (B, E, h, w) -> ids (B, h, w) int64 in [0, K), without randomness."""
        raise NotImplementedError

    def embed_ids(self, ids):
        """ids (...) -> vectors (..., E)."""
        raise NotImplementedError

    def codebook_weight(self):
        """The parameter (K, E) that holds the vectors of the codes. After place_codes and restart_codes, training
        copies it to the averaged weights, and after place_codes also to the other processes."""
        raise NotImplementedError

    def place_codes(self, vectors, seed):
        """Set the codebook from latents `vectors` (n, E), n >= 32 K. Called once, at `start_step`, by the main
        process alone."""
        raise NotImplementedError

    def restart_codes(self, unused, z, rng):
        """Move the codes `unused` (K,) bool onto latents of z (B, E, h, w). Called every `restart_steps` steps, with
        the same arguments in all processes."""
        raise NotImplementedError
