"""The interface of orders of sampling. B samples, L tokens, K codes; S times, counted down, t = S..1."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.registry import Registry
from models.samplers.schedules import Pace
from utils.core.device import send

ORDERS = Registry("order")
register = ORDERS.register


class Order:
    """The order of a batch of samples: at each time the tokens of the lowest scores, as many as the pace asks for.

    u (B, S, L): uniforms in [0, 1), the order's only source of randomness, those of time t at [:, S - t]. An order
    that is known before the network runs has the same ones at all times.
    unknown (B, L) bool: the tokens to draw. grid: height and width of the codes, h w = L.
    """

    def __init__(self, u: Tensor, pace: Pace, unknown: Tensor, grid: tuple[int, int]) -> None:
        self.u, self.pace, self.unknown, self.grid = u, pace, unknown, grid
        self.counts = unknown.sum(1).tolist()  # of tokens to draw, (B,)

    def scores(self, t: int, logits: Tensor, codes: Tensor) -> Tensor:
        """Scores (B, L), finite; the lowest are revealed first. logits (B, L, K): the network's predictions; codes
        (B, L): what was drawn from them."""
        raise NotImplementedError

    def times_of_passes(self) -> Sequence[int]:
        """The times at which the network must run, the latest first."""
        revealed = sum(np.diff(self.pace.known(n)) + self.pace.remasked(n) for n in set(self.counts))
        return (self.pace.steps - np.flatnonzero(revealed)).tolist()

    def reveals(self, t: int, masked: Tensor, logits: Tensor, codes: Tensor) -> Tensor:
        """The tokens to reveal at time t: (B, L) bool. After t = 1, all must be known.

        masked (B, L) bool: the tokens that are not known yet; logits, codes: as for `scores`.
        """
        step = self.pace.steps - t
        number = [np.diff(self.pace.known(n))[step] + self.pace.remasked(n)[step] for n in self.counts]
        return lowest(self.scores(t, logits, codes), masked, number)

    def remasks(self, t: int, drawn: Tensor, u: Tensor) -> Tensor:
        """The tokens to mask again at time t: (B, L) bool. drawn (B, L) bool: those that were drawn at earlier times;
        u (B, L): uniforms of this time."""
        return lowest(u, drawn, [self.pace.remasked(n)[self.pace.steps - t] for n in self.counts])


class KnownOrder(Order):
    """An order that does not depend on the network: a subclass defines `known_scores`."""

    def known_scores(self) -> Tensor:
        """Scores (B, L), finite; the lowest are revealed first."""
        raise NotImplementedError

    def scores(self, t: int, logits: Tensor, codes: Tensor) -> Tensor:
        return self.known_scores()

    def times(self) -> Tensor:
        """The time at which each token is revealed: (B, L) int64 in 1..S; 0 if it is known from the start."""
        ranks = ranks_of(self.known_scores().masked_fill(~self.unknown, torch.inf))
        L = ranks.shape[1]
        by_rank = [np.pad(self.pace.times(n), (0, L - n)) for n in self.counts]
        return torch.from_numpy(np.stack(by_rank)).to(ranks.device).gather(1, ranks)


def lowest(scores: Tensor, among: Tensor, number: Sequence[int]) -> Tensor:
    """Of each row the tokens `among` (B, L) with the lowest scores (B, L), `number` of them: (B, L) bool."""
    ranks = ranks_of(scores.masked_fill(~among, torch.inf))
    return ranks < send(torch.tensor(number), scores.device)[:, None]


def ranks_of(scores: Tensor) -> Tensor:
    """The place of each token if a row of scores (B, L) is sorted; of equal ones the first token is first: (B, L)."""
    return scores.argsort(dim=1, stable=True).argsort(1)
