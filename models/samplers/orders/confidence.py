"""The codes that the network is most certain of come first (Chang et al. 2022, MaskGIT, arXiv 2202.04200)."""

import torch

from models.samplers.orders.base import Order, register

NOISE = 4.5  # the factor of MaskGIT's noise at the first step, its "choice temperature" for ImageNet


@register("confidence")
class ConfidenceOrder(Order):
    """At each pass every masked token gets a code. Those with the highest log p(code) + noise are kept, where p is the
    network's prediction (at temperature 1) and the noise is Gumbel's, with a factor that falls linearly to 0."""

    def scores(self, t, logits, codes):
        log_p = logits.float().log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
        u = self.u[:, self.pace.steps - t].clamp(min=torch.finfo(torch.float32).tiny)
        gumbel = -(-u.log()).log()
        return -(log_p + NOISE * (t - 1) / self.pace.steps * gumbel)
