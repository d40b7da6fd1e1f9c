"""Autoregressive prior: a causal Transformer over the codes in raster order.

Shapes: B samples, L tokens, K codes.
"""

import math

import torch
import torch.nn.functional as F

from models.fast import CachedDecoder, frozen
from models.samplers.base import Sampler, SamplerLoss, draw_codes, no_progress, register
from models.transformer import Transformer
from utils.core.errors import UserError

FLAGS: dict[str, dict] = {"top_k": {}, "top_p": {}}  # the absorbing sampler declares these flags


@register("autoregressive")
class AutoregressiveSampler(Sampler):
    """p(ids) = prod_i p(ids_i | ids_<i)."""

    needs_raster_order = True

    def __init__(self, codebook_size, block_size, transformer, top_k, top_p):
        super().__init__(codebook_size, block_size)
        self.top_k, self.top_p = top_k, top_p
        self.net = Transformer(transformer, vocab_size=codebook_size, n_classes=codebook_size, causal=True)

    def nll(self, ids, rng=None, passes=0, progress=no_progress):
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
    def sample(self, uniforms, temp=1.0, progress=no_progress):
        """uniforms (B, L) -> ids (B, L); L network steps of one token each."""
        ids = torch.full(uniforms.shape, self.mask_id, device=uniforms.device)
        return self._continued(ids, uniforms, temp, progress)

    @torch.no_grad()
    def complete(self, known, uniforms, temp=1.0):
        """See the base class. All unknown tokens must come after the known ones of their sequence."""
        unknown = known == self.mask_id
        if (unknown[:, :-1] & ~unknown[:, 1:]).any():
            raise UserError(
                "the autoregressive sampler continues a picture row by row: it redraws only codes that come after all "
                "kept codes, such as those of the lower half"
            )
        return self._continued(known.clone(), uniforms, temp, no_progress)

    def _continued(self, ids, uniforms, temp, progress):
        """Draw the tokens of ids (B, L) that are mask_id, in place."""
        decoder = CachedDecoder(self.net)
        with frozen(self):
            for i in progress(range(self.block_size)):
                drawn = draw_codes(decoder.next_logits(ids[:, :i]), uniforms[:, i], temp, self.top_k, self.top_p)
                ids[:, i] = drawn.where(ids[:, i] == self.mask_id, ids[:, i])
        return ids

    def revealed_at(self, ids, uniforms, temp=1.0, unknown=None):
        L = self.block_size
        shares = (torch.arange(1, L + 1, device=ids.device) / L).expand(len(ids), -1)
        return shares if unknown is None else shares.where(unknown, 0)
