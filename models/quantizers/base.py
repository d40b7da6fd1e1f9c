"""The interface of every quantizer. Shapes: B images, E = emb_dim, h x w latents, K = codebook_size."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.registry import Registry
from utils.core.seed import StepRandom

QUANTIZERS = Registry("quantizer")
register = QUANTIZERS.register


@dataclass
class Quantized:
    """What `Quantizer.forward` returns.

    z_q (B, E, h, w): the quantized latents, differentiable with respect to z;
    loss (): the codebook loss, with a gradient; ids (B, h, w) int64: the chosen codes (None if nothing was quantized);
    mean_distance (): mean squared distance to all codes (0 if it has no meaning).
    """

    z_q: Tensor
    loss: Tensor
    ids: Tensor | None
    mean_distance: Tensor


class Quantizer(nn.Module):
    """Turns latents into codes and codes into vectors.

    The arguments of a subclass's constructor are fields of the configuration with the same names (models/build.py). Its
    own flags are such fields, too.

    Subclasses implement `forward`, `encode` and `embed_ids`. A subclass with a `start_step` also implements
    `place_codes` and `codebook_weight`; one with `restart_steps` implements `restart_codes` and `codebook_weight`.
    """

    # The step from which forward quantizes. If it is not 0, training calls place_codes at the start of this step.
    start_step = 0
    # Steps between calls of restart_codes in training; 0: never.
    restart_steps = 0

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size

    def forward(self, z: Tensor, step: int | None = None, rng: StepRandom | None = None) -> Quantized:
        """Latents z (B, E, h, w) -> Quantized.

        step: the training step; None: the state after training. rng: the source of all random numbers of a training
        step; None: the global generator.
        """
        raise NotImplementedError

    def encode(self, z: Tensor) -> Tensor:
        """Latents z (B, E, h, w) -> ids (B, h, w) int64 in [0, K), without randomness."""
        raise NotImplementedError

    def embed_ids(self, ids: Tensor) -> Tensor:
        """ids (...) -> vectors (..., E)."""
        raise NotImplementedError

    def codebook_weight(self) -> nn.Parameter:
        """The parameter (K, E) that holds the vectors of the codes. After place_codes and restart_codes, training
        copies it to the averaged weights, and after place_codes also to the other processes."""
        raise NotImplementedError

    def place_codes(self, vectors: Tensor, seed: int) -> None:
        """Set the codebook from latents `vectors` (n, E), n >= 32 K. Called once, at `start_step`, by the main
        process alone."""
        raise NotImplementedError

    def restart_codes(self, unused: Tensor, z: Tensor, rng: StepRandom) -> None:
        """Move the codes `unused` (K,) bool onto latents of z (B, E, h, w). Called every `restart_steps` steps, with
        the same arguments in all processes."""
        raise NotImplementedError
