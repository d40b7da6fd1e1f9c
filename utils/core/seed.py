"""Random numbers that are functions of (seed, purpose, step, sample). There is no state to save or to restore.

A resumed run draws the same numbers as an uninterrupted run. N processes together draw the same numbers as one process.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch


def derive_seed(*words: int | str) -> int:
    """Return a 63-bit seed made from any words (int or str). Different words give unrelated seeds."""
    text = "\x1f".join(str(w) for w in words).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_everything(*words: int | str) -> None:
    """Seed torch's and numpy's global generators (dropout, initialisation)."""
    value = derive_seed(*words)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)


class StepRandom:
    """Draws random numbers for the samples of the global batch of one step.

    Every rank draws the rows of all ranks and keeps its own rows. The numbers of a sample therefore do not depend on
    the number of processes. They depend on the order of the calls.
    """

    def __init__(
        self,
        *words: int | str,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        at: tuple[int, int] | None = None,
    ):
        """The rows of a batch are divided into world_size equal blocks, and this object returns the block with the
        number `rank`. at: (first row, number of all rows), an alternative to rank and world_size."""
        self.words, self.generator = words, torch.Generator(device=device).manual_seed(derive_seed(*words))
        self.rank, self.world_size, self.at = rank, world_size, at

    def rand(self, n: int, *shape: int) -> torch.Tensor:
        """Return the n rows of this rank, (n, *shape) float32, uniform on [0, 1)."""
        first, total = self.at or (n * self.rank, n * self.world_size)
        u = torch.rand(total, *shape, generator=self.generator, device=self.generator.device)
        return u[first : first + n]

    def split(self, parts: int) -> list["StepRandom"]:
        """Return a list with one StepRandom for each of `parts` equal parts of this rank's rows. Call this method
        before any draw."""
        if parts == 1:
            return [self]
        device, first, n = self.generator.device, self.rank * parts, self.world_size * parts
        return [StepRandom(*self.words, device=device, rank=first + i, world_size=n) for i in range(parts)]


def sample_uniforms(
    seed: int, indices: Iterable, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return random numbers, uniform on [0, 1), with one row for each sample. Row i is a function of (seed,
    indices[i]).

    The result is float32 of shape (len(indices), *shape). The numbers are drawn on the CPU, so that a sample is the
    same on every device and in every batch.
    """
    rows = [
        torch.rand(shape, generator=torch.Generator().manual_seed(derive_seed("sample", seed, int(i)))) for i in indices
    ]
    return torch.stack(rows).to(device)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of n items in an epoch, as an int64 numpy array."""
    return np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(n)
