"""Schedules of sampling: how many tokens each pass reveals.

n: the tokens that a sample draws, S: sampling steps, r: the share of the steps that are done.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The share of the tokens that is still masked. cosine: Chang et al. 2022 (MaskGIT), section 3.3; arccos: Besnier and
# Chen 2023, arXiv 2310.14400.
MASKED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": lambda r: 1 - r,
    "cosine": lambda r: np.cos(np.pi / 2 * r),
    "arccos": lambda r: np.arccos(r) * 2 / np.pi,
}


@dataclass(frozen=True)
class Pace:
    """S sampling steps, the name of a schedule, and the share of remasking: Wang et al. 2025, ReMDM, arXiv 2503.00307,
    with the rescaled schedule sigma_t = eta sigma_t^max."""

    steps: int
    schedule: str = "uniform"
    remask_eta: float = 0.0

    def known(self, n: int) -> np.ndarray:
        """How many of n tokens are known after 0, 1, ... S steps: n - floor(n masked(r)), int64 (S + 1,)."""
        return _known(self, n)

    def remasked(self, n: int) -> np.ndarray:
        """How many known tokens each step masks again: sigma_t of them, int64 (S,). The step reveals as many more, so
        that `known` stays true. Fractions are carried over to the next steps."""
        before, left = self.known(n)[:-1], n - self.known(n)[1:]
        # sigma_t^max = min(1, (1 - alpha_s) / alpha_t), with alpha_t n = before and (1 - alpha_s) n = left
        total = (self.remask_eta * np.minimum(before, left)).cumsum()
        return np.diff(np.floor(total.round(9)).astype(np.int64), prepend=0)

    def times(self, n: int) -> np.ndarray:
        """The time t in S..1 at which the first, second, ... of n tokens is revealed: int64 (n,)."""
        return self.steps + 1 - np.searchsorted(self.known(n), np.arange(n), side="right")


@functools.lru_cache(256)
def _known(pace: Pace, n: int) -> np.ndarray:
    r = np.arange(pace.steps + 1) / pace.steps
    # Rounded, so that an error in the last digit takes no token away.
    return n - np.floor((n * MASKED[pace.schedule](r)).round(9)).astype(np.int64)
