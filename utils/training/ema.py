"""Exponential moving average of a model's parameters."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class EMA:
    """Keeps `model`, a copy of the source. Each update moves the copy's parameters m towards the source's parameters p:
    m <- beta m + (1 - beta) p.

    Only parameters are averaged, as in the published models. Buffers (batch-norm statistics, loss histories) keep their
    initial values. shared: submodules that are never trained (LPIPS) and therefore need no second copy. warmup: limit
    the decay of the n-th update to (1 + n) / (10 + n). Without warmup, the average of a short run would consist mostly
    of its first weights.
    """

    def __init__(
        self, source: nn.Module, beta: float, shared: Iterable[nn.Module | None] = (), warmup: bool = False
    ) -> None:
        self.beta, self.warmup = beta, warmup
        self.model = copy.deepcopy(source, {id(m): m for m in shared if m is not None})
        self.model.eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), source.parameters(), strict=True)
        self.pairs = [(m, p) for m, p in pairs if m is not p]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Move towards the source for the n-th time, n >= 1. One kernel launch updates all parameters."""
        averaged, current = zip(*self.pairs, strict=True)
        torch._foreach_lerp_(averaged, current, 1.0 - self.decay(n))

    def decay(self, n: int) -> float:
        """Return the decay of the n-th update."""
        return min(self.beta, (1 + n) / (10 + n)) if self.warmup else self.beta

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
