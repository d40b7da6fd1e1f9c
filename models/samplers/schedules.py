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
    """S sampling steps and the name of a schedule."""

    steps: int
    schedule: str = "uniform"

    def known(self, n: int) -> np.ndarray:
        """How many of n tokens are known after 0, 1, ... S steps: n - floor(n masked(r)), int64 (S + 1,)."""
        return _known(self, n)

    def times(self, n: int) -> np.ndarray:
        """The time t in S..1 at which the first, second, ... of n tokens is revealed: int64 (n,)."""
        return self.steps + 1 - np.searchsorted(self.known(n), np.arange(n), side="right")


@functools.lru_cache(256)
def _known(pace: Pace, n: int) -> np.ndarray:
    r = np.arange(pace.steps + 1) / pace.steps
    # Rounded, so that an error in the last digit takes no token away.
    return n - np.floor((n * MASKED[pace.schedule](r)).round(9)).astype(np.int64)
