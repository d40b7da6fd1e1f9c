"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): each dimension is rounded to a few levels."""

import math

import torch
from torch import nn

from models.layers import in_layout_of
from models.quantizers.base import Quantized, Quantizer, register
from utils.core.seed import StepRandom

FLAGS = {
    "fsq_least_levels": {
        "default": 5,
        "help": "least number of levels of a dimension: codebook_size is split into as many such factors as possible. "
        "240, 1000, 4375, 15360 and 64000 codes give the levels of the paper (fsq)",
        "min": 3,
        "role": "autoencoder",
    },
}
EPS = 1e-3  # the bounded values can exceed the outermost levels by this share


def levels_of(size: int, least: int) -> list[int]:
    """Split `size` into as many factors of at least `least` as possible, in falling order. Among several solutions,
    take the solution whose largest factor is smallest. Return [size] if there is no solution."""
    found = [[size]]
    for last in range(least, math.isqrt(size) + 1):
        if size % last == 0:
            found.append([*levels_of(size // last, last), last])
    return min(found, key=lambda levels: (-len(levels), levels))


@register("fsq")
class FSQQuantizer(Quantizer):
    """A code is a point of a grid with d dimensions; dimension i has levels[i] values in [-1, 1]. One linear map takes
    the E channels of the latents to d dimensions. A second linear map takes the d dimensions back to E channels. There
    is no codebook and no codebook loss."""

    levels: torch.Tensor

    def __init__(self, codebook_size: int, emb_dim: int, fsq_least_levels: int) -> None:
        super().__init__(codebook_size)
        levels = levels_of(codebook_size, fsq_least_levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.project_in = nn.Linear(emb_dim, len(levels))
        self.project_out = nn.Linear(len(levels), emb_dim)

    def digits(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, E, h, w) -> the numbers of the levels (B, h, w, d), from 0, with a straight-through gradient.
        The computation is in float32, also under autocast, because rounding depends on the last bits."""
        with torch.autocast(z.device.type, enabled=False):
            x = self.project_in(z.float().permute(0, 2, 3, 1))
        top = self.levels - 1
        reach, offset = top * (1 + EPS) / 2, top % 2 / 2  # an even number of levels is not symmetric about 0
        x = (x + (offset / reach.clamp(min=EPS)).atanh()).tanh() * reach - offset + self.levels // 2
        return x + (x.round().clamp(min=0).minimum(top) - x).detach()

    def ids_of(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits.round().long() * (self.levels.cumprod(0) // self.levels)).sum(-1)

    def vectors(self, digits: torch.Tensor) -> torch.Tensor:
        half = self.levels // 2
        with torch.autocast(digits.device.type, enabled=False):
            return self.project_out((digits - half) / half.clamp(min=1))

    def forward(self, z: torch.Tensor, step: int | None = None, rng: StepRandom | None = None) -> Quantized:
        digits = self.digits(z)
        zero = 0.0 * digits.sum()  # the zero has a gradient, like every loss
        z_q = in_layout_of(z, self.vectors(digits).permute(0, 3, 1, 2))
        return Quantized(z_q, zero, self.ids_of(digits), zero.detach())

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        return self.ids_of(self.digits(z))

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return self.vectors(ids[..., None] // (self.levels.cumprod(0) // self.levels) % self.levels)
