"""Losses of stage 1 (Esser et al. 2021, VQGAN). B images, C channels, H x W pixels."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import in_parts
from utils.core import distributed

ADAPTIVE_EPS = 1e-4


def reconstruction_nll(x, x_hat, perceptual, perceptual_weight, parts=1):
    """mean(|x - x_hat| + perceptual_weight * LPIPS(x, x_hat)) and its two parts, all ().

    perceptual: a callable (x, x_hat) -> (B, 1, 1, 1), or None if the weight is 0. It gets
    images in [0, 1] although LPIPS expects [-1, 1], because the published models were trained like this.
    parts: the number of parts of the batch that are computed one after the other (models.parts).
    """
    l1 = (x - x_hat).abs().mean()
    if perceptual is None:
        return l1, l1, l1.new_zeros(())
    distance = in_parts(parts, perceptual, x.contiguous(), x_hat.contiguous()).float().mean()
    return l1 + perceptual_weight * distance, l1, distance


def adaptive_weight(nll_gradient, g_gradient, maximum):
    """clamp(|grad nll| / (|grad g| + 1e-4), 0, maximum), gradients at the last layer (VQGAN, eq. 7)."""
    ratio = nll_gradient.float().norm() / (g_gradient.float().norm() + ADAPTIVE_EPS)
    return ratio.clamp(0.0, maximum).detach()


def hinge_discriminator_loss(logits_real, logits_fake):
    """0.5 (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def ramp(step, length):
    """The share of a weight that grows linearly from 0, at step 0, to 1, at step `length`: 0 before, 1 afterwards."""
    if step < 0:
        return 0.0
    return min(1.0, step / length) if length else 1.0


class LeCam(nn.Module):
    """LeCam regularisation of a discriminator D (Tseng et al. 2021, arXiv 2104.03310):

    mean((D(x) - a_fake)^2) + mean((D(x_hat) - a_real)^2), where a_real and a_fake are moving averages of the means of
    D(x) and D(x_hat) over the images of all processes. They begin at 0, about the outputs of an untrained D.
    """

    DECAY = 0.99  # of the averages, as in the paper
    averages: torch.Tensor  # (2,): a_real, a_fake

    def __init__(self):
        super().__init__()
        self.register_buffer("averages", torch.zeros(2))

    def forward(self, logits_real, logits_fake):
        """Update the averages, and return the loss () of logits (B, 1, h, w)."""
        means = distributed.all_reduce_mean(torch.stack((logits_real.detach().mean(), logits_fake.detach().mean())))
        updated = self.averages.lerp(means, 1 - self.DECAY)
        self.averages = torch.where(means.isfinite(), updated, self.averages)  # fp16 overflows: that update is skipped
        return (logits_real - self.averages[1]).square().mean() + (logits_fake - self.averages[0]).square().mean()


def gaussian_nll(x, mean, logsigma):
    """-log N(x; mean, exp(logsigma)) summed over the subpixels: (B, C, H, W) -> (B,) in nats."""
    z = (x - mean) * torch.exp(-logsigma)
    return (0.5 * z.square() + logsigma + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
