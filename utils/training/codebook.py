"""Counts how often each code is used in training, and moves codes."""

from collections.abc import Iterator
from typing import Any

import torch

from utils.core import distributed
from utils.core.seed import StepRandom, derive_seed
from utils.data.batches import Batch
from utils.data.pixels import to_float
from utils.training.meters import CodeUsage


class Codebook:
    """Counts the uses of the codes, and calls the methods of a quantizer that move codes (models/quantizers/base.py).
    Moved codes are copied to all models (the trained one and its average) and all processes. Without the copy, the
    average would need many updates to follow such a jump."""

    def __init__(self, models: list[Any], H: Any, device: torch.device) -> None:
        self.models, self.H, self.device, self.quantizer = models, H, device, models[0].ae.quantize
        self.usage, self.recent_usage = (CodeUsage(H.codebook_size, device) for _ in range(2))

    @torch.no_grad()
    def place(self, batches: Iterator[Batch]) -> None:
        """At the quantizer's start_step, place its codes by the latents of the next batches, so that every code starts
        near latents."""
        vectors: list[torch.Tensor] = []
        while sum(map(len, vectors)) < 32 * self.H.codebook_size:
            z = self.models[0].ae.encoder(to_float(next(batches)[0].to(self.device))).float()
            vectors.append(distributed.all_gather_rows(z).permute(0, 2, 3, 1).reshape(-1, self.H.emb_dim))
        if distributed.is_main():  # one process runs k-means, because its results depend on the processor
            self.quantizer.place_codes(torch.cat(vectors), derive_seed("kmeans", self.H.seed))
        distributed.broadcast_in_place([self.quantizer.codebook_weight()])
        self._copy(slice(None))

    @torch.no_grad()
    def update(self, ids: torch.Tensor | None, x: torch.Tensor, step: int) -> None:
        """Count the codes `ids` of the images x (B, C, H, W) of a step. Every restart_steps steps, move unused codes
        onto latents of x. A code is unused if no image has used it since the last restart."""
        if ids is None:
            return
        self.usage.add(ids)
        self.recent_usage.add(ids)
        if self.quantizer.restart_steps and step % self.quantizer.restart_steps == 0:
            unused = self.recent_usage.pop_counts().to(self.device) == 0
            z = distributed.all_gather_rows(self.models[0].ae.encoder(x).float())
            self.quantizer.restart_codes(unused, z, StepRandom("restart", self.H.seed, step, device=self.device))
            self._copy(unused)

    def _copy(self, rows: Any) -> None:
        first, *others = (model.ae.quantize.codebook_weight().data for model in self.models)
        for codebook in others:
            codebook[rows] = first[rows]
