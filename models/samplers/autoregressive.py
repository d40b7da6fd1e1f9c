"""Autoregressive prior: a causal Transformer over the codes in raster order.

Shapes: B samples, L tokens, K codes.
"""

import math

import torch
import torch.nn.functional as F

from models.samplers.base import Sampler, SamplerLoss, draw_codes, register
from models.transformer import frozen


@register("autoregressive")
class AutoregressiveSampler(Sampler):
    """p(ids) = prod_i p(ids_i | ids_<i)."""

    needs_raster_order = True

    def __init__(self, H):
        super().__init__(H)
        self.net = self.build_transformer(H, vocab_size=H.codebook_size, causal=True)

    def nll(self, ids, rng=None, passes=0, progress=None):
        """Exact negative log likelihood, ids (B, L) -> (B,) in nats; the other arguments have no effect."""
        logits = self.net(ids).float()
        return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").sum(1)

    def loss(self, ids, rng=None):
        """The mean negative log likelihood in bits per token."""
        bits = self.nll(ids) / (math.log(2) * ids.shape[1])
        return SamplerLoss(bits.mean(), bits.detach())

    def predict(self, ids, rows, cols):
        """Each token `cols` must come right after the known ones: see the base class."""
        # No position attends to the unknown tokens, but the embedding needs a valid code.
        return self.net(ids.masked_fill(ids == self.mask_id, 0), at=(rows, cols))

    def draws_per_sample(self):
        return (self.block_size,)

    @torch.no_grad()
    def sample(self, uniforms, temp=1.0, progress=None):
        """uniforms (B, L) -> ids (B, L); L network steps of one token each, with cached keys and values."""
        B, L = uniforms.shape
        ids = torch.empty(B, L, dtype=torch.int64, device=uniforms.device)
        cache = self.net.new_cache()
        with frozen(self.net):
            for i in (progress or iter)(range(L)):
                last = ids[:, i - 1] if i > 0 else None
                ids[:, i] = draw_codes(self.net.next_logits(last, cache, B), uniforms[:, i], temp)
        return ids
