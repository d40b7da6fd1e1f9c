"""Gumbel-softmax quantization (Jang et al. 2017; used for images by DALL-E)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.quantizers.base import Quantized, Quantizer, register

MIN_TEMPERATURE = 1 / 16
ANNEAL_STEPS = 160_000
FLAGS = {
    "gumbel_kl_weight": {"default": 1e-8, "help": "weight of the KL to uniform (gumbel)", "min": 0.0},
    "gumbel_straight_through": {"default": False, "help": "one-hot codes in training too (gumbel)"},
}


@register("gumbel")
class GumbelQuantizer(Quantizer):
    """A 1x1 convolution gives K logits per latent. In training, a relaxed sample weights the vectors of all codes.

    Outside training (and in `encode`) the code is the arg max of the logits, without noise. An image therefore always
    has the same codes, and a sampler can be trained on them.
    """

    def __init__(self, codebook_size, emb_dim, gumbel_kl_weight, gumbel_straight_through):
        super().__init__(codebook_size)
        self.kl_weight = gumbel_kl_weight
        self.straight_through = gumbel_straight_through
        self.proj = nn.Conv2d(emb_dim, codebook_size, kernel_size=1)
        self.embed = nn.Embedding(codebook_size, emb_dim)

    @staticmethod
    def temperature(step):
        return max(MIN_TEMPERATURE, 1.0 - step / ANNEAL_STEPS)

    def logits(self, z):
        """Compute logits: (B, E, h, w) -> (B, K, h, w). Half precision is too coarse for this softmax."""
        with torch.autocast(z.device.type, enabled=False):
            return self.proj(z.float())

    def sample(self, logits, step, rng):
        """Draw a relaxed sample over dim 1, of the shape of logits. With straight_through the sample is one-hot."""
        tau = self.temperature(step)
        if rng is None:
            return F.gumbel_softmax(logits, tau=tau, dim=1, hard=self.straight_through)
        B, K, h, w = logits.shape
        exponential = (-torch.log1p(-rng.rand(B, K, h, w))).clamp(min=1e-30)
        soft = ((logits - exponential.log()) / tau).softmax(1)
        if not self.straight_through:
            return soft
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        return hard + soft - soft.detach()

    def forward(self, z, step=None, rng=None):
        logits = self.logits(z)
        if self.training:
            weights = self.sample(logits, step or 0, rng)
        else:
            weights = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        with torch.autocast(z.device.type, enabled=False):
            z_q = torch.einsum("bkhw,ke->behw", weights, self.embed.weight.float())
        log_q = logits.log_softmax(1)
        uniform_kl = (log_q.exp() * (log_q + math.log(self.codebook_size))).sum(1).mean()
        return Quantized(z_q, self.kl_weight * uniform_kl, weights.argmax(1), logits.new_zeros(()))

    def encode(self, z):
        return self.logits(z).argmax(1)

    def embed_ids(self, ids):
        return self.embed(ids)
