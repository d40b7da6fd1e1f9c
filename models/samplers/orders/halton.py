"""Low-discrepancy points on the grid (Besnier et al. 2025, arXiv 2503.17076)."""

import functools

import numpy as np
import torch
from torch import Tensor

from models.samplers.orders.base import KnownOrder, register


@register("halton")
class HaltonOrder(KnownOrder):
    """The tokens that one pass reveals together, and so without regard to each other, are far apart: they follow the
    Halton sequence over the grid. Each sample shifts it by a random vector on the torus, from the first two uniforms.
    """

    def known_scores(self):
        return halton_ranks(self.u[:, 0], self.grid)


def halton_ranks(u: Tensor, grid: tuple[int, int]) -> Tensor:
    """The places of all cells of a grid (h, w) in the order: float32 (B, h w). u (B, h w) in [0, 1)."""
    h, w = grid
    # In float64 on the CPU, so that all devices shift alike.
    down, right = ((u[:, i].cpu().double() * side).long()[:, None, None] for i, side in ((0, h), (-1, w)))
    rows, columns = torch.arange(h)[:, None], torch.arange(w)
    ranks = torch.from_numpy(sequence_ranks(h, w))[(rows - down) % h, (columns - right) % w]
    return ranks.flatten(1).float().to(u.device)


@functools.lru_cache(8)
def sequence_ranks(h: int, w: int) -> np.ndarray:
    """When the Halton sequence in bases 2 (rows) and 3 (columns) first enters each cell: ranks (h, w) int64."""
    from scipy.stats.qmc import Halton  # here: importing it takes a while, and few runs need it

    # Any 2^a 3^b points in succession have one in each box of 2^-a by 3^-b. With 2^a < 4h and 3^b < 6w, each cell
    # contains a box.
    points = Halton(d=2, scramble=False).random(24 * h * w)
    cells = (points * (h, w)).astype(np.int64) @ (w, 1)
    first = np.unique(cells, return_index=True)[1]
    return first.argsort().argsort().reshape(h, w)
