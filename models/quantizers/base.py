"""The interface of every quantizer. Shapes: B images, E = emb_dim, h x w latents, K = codebook_size."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.registry import Registry
from utils.core.seed import StepRandom

QUANTIZERS = Registry("quantizer")
register = QUANTIZERS.register


@dataclass
class Quantized:
    """The result of `Quantizer.forward`.

    z_q (B, E, h, w): the quantized latents, differentiable with respect to z;
    loss (): the codebook loss, with a gradient; ids (B, h, w) int64: the chosen codes (None if nothing was quantized);
    mean_distance (): mean squared distance of the latents to all codes (0 for a quantizer without such distances).
    """

    z_q: Tensor
    loss: Tensor
    ids: Tensor | None
    mean_distance: Tensor


class Quantizer(nn.Module):
    """Turns latents into codes and codes into vectors.

    models/build.py fills the arguments of a subclass's constructor with the fields of the configuration that have the
    same names. The flags of the quantizer are such fields, too.

    Subclasses implement `forward`, `encode` and `embed_ids`. A subclass with a `start_step` also implements
    `place_codes` and `codebook_weight`; one with `restart_steps` implements `restart_codes` and `codebook_weight`.
    """

    # `forward` quantizes from this step on. If start_step is not 0, training calls place_codes at the start of it.
    start_step = 0
    # Training calls restart_codes every `restart_steps` steps; with 0, training never calls restart_codes.
    restart_steps = 0

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size

    def forward(self, z: Tensor, step: int | None = None, rng: StepRandom | None = None) -> Quantized:
        """Quantize latents: z (B, E, h, w) -> Quantized.

        step: the training step; None: the state after training. rng: the source of all random numbers of a training
        step; None: the global generator.
        """
        raise NotImplementedError

    def encode(self, z: Tensor) -> Tensor:
        """Choose the codes of latents without randomness: z (B, E, h, w) -> ids (B, h, w) int64 in [0, K)."""
        raise NotImplementedError

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Return the vectors of codes: ids (...) -> vectors (..., E)."""
        raise NotImplementedError

    def codebook_weight(self) -> nn.Parameter:
        """Return the parameter (K, E) that holds the vectors of the codes. After place_codes and restart_codes,
        training copies this parameter to the averaged weights. After place_codes, training also copies this parameter
        to the other processes."""
        raise NotImplementedError

    def place_codes(self, vectors: Tensor, seed: int) -> None:
        """Set the codebook from latents `vectors` (n, E), n >= 32 K. The main process alone calls this method, once,
        at `start_step`."""
        raise NotImplementedError

    def restart_codes(self, unused: Tensor, z: Tensor, rng: StepRandom) -> None:
        """Move the codes `unused` (K,) bool onto latents of z (B, E, h, w). Training calls this method every
        `restart_steps` steps, with the same arguments in all processes."""
        raise NotImplementedError
