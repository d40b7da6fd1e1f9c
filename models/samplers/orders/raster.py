"""Row by row, from left to right."""

import torch

from models.samplers.orders.base import KnownOrder, register


@register("raster")
class RasterOrder(KnownOrder):
    """As an autoregressive model; with one token a pass it is one."""

    def known_scores(self):
        B, _, L = self.u.shape
        return torch.arange(L, dtype=torch.float32, device=self.u.device).expand(B, L)
