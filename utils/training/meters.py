"""Computes means that stay on the device until they are read."""

from typing import Any

import torch

from utils.core import distributed


class Meters:
    """Keeps the sums and counts of named scalars. Only reading the results waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        # In a long validation, float32 sums lose digits; Apple's GPUs do not support float64.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, values: dict[str, Any], count: int = 1) -> None:
        """Add values {name: number or () tensor}, each weighted by count."""
        for name, value in values.items():
            if torch.is_tensor(value):
                value = value.detach().to(self.device, self.dtype)
            else:  # a copy from the host would wait for all pending work of the device
                value = torch.full((), value, dtype=self.dtype, device=self.device)
            pair = torch.stack((value * count, torch.full_like(value, count)))
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def pop_means(self) -> dict[str, float]:
        """Return {name: mean over the steps and processes since the last call}, and reset."""
        means = {name: total / count for name, (total, count) in self._totals().items()}
        self.sums = {}
        return means

    def _totals(self) -> dict[str, list[float]]:
        """Return {name: (sum, count)} over all processes. A process that had little work may lack some names."""
        table = torch.stack(list(self.sums.values())).cpu().tolist() if self.sums else []
        totals: dict[str, list[float]] = {}
        for own in distributed.from_all(dict(zip(self.sums, table, strict=True))):
            for name, pair in own.items():
                totals[name] = [a + b for a, b in zip(totals.get(name, (0.0, 0.0)), pair, strict=True)]
        return totals

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state that a single process would have. Any number of processes can resume from this state. All
        processes call this method."""
        totals = {name: torch.tensor(pair, dtype=self.dtype) for name, pair in self._totals().items()}
        return {name: pair / distributed.world_size() for name, pair in totals.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.sums = {name: pair.to(self.device, self.dtype) for name, pair in state.items()}


class CodeUsage:
    """Counts the uses of each code since the last reset, in a tensor (K,) on the device."""

    def __init__(self, codebook_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def add(self, ids: torch.Tensor) -> None:
        """Count ids of any shape, values in [0, K). (torch.bincount would wait for the device to find the largest.)"""
        ids = ids.flatten().long()
        self.counts.scatter_add_(0, ids, torch.ones_like(ids))

    def pop_counts(self) -> torch.Tensor:
        """Return counts (K,) int64 on the CPU, summed over the processes, and reset."""
        counts = distributed.all_reduce_sum(self.counts.clone()).cpu()
        self.counts.zero_()
        return counts

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sum of the counts of all processes. All processes call this method."""
        return dict(counts=distributed.all_reduce_sum(self.counts.clone()).cpu())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.counts.copy_(state["counts"])
        if not distributed.is_main():  # only the main process keeps the sum, so that it counts once
            self.counts.zero_()
