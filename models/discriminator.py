"""The adversarial part of stage 1: the discriminator, the augmentation of its inputs, its loss and its weight."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.core import distributed

TRANSLATION = 1 / 8
ADAPTIVE_EPS = 1e-4


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics cover the images of all processes. (nn.SyncBatchNorm needs CUDA.)"""

    # nn.BatchNorm2d allows None for these attributes. In this class they are never None.
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def forward(self, x):
        if not self.training or not distributed.join_group():
            return super().forward(x)
        x = x.float()  # sums over many pixels need float32, which autocast uses, too
        mean = distributed.mean_with_gradient(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = distributed.mean_with_gradient(centred.square().mean((0, 2, 3)))
        # The running statistics equal those of nn.BatchNorm2d, with the unbiased estimate of the variance.
        count = x[:, 0].numel() * distributed.world_size()
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) gives one realness score for each patch, (B, C, H, W) -> (B, 1, h', w').

    The order and the names of the modules are those of the published checkpoints.
    """

    def __init__(self, n_channels, ndf, disc_layers):
        super().__init__()
        layers = [nn.Conv2d(n_channels, ndf, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, disc_layers + 1):
            c_in, width = width, ndf * min(2**n, 8)
            stride = 2 if n < disc_layers else 1
            layers += [
                nn.Conv2d(c_in, width, kernel_size=4, stride=stride, padding=1, bias=False),
                BatchNorm(width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, kernel_size=4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x)


def diff_augment(x, rng):
    """Augment images x (B, C, H, W) with a gradient (Zhao et al. 2020). Brightness, saturation, contrast and
    translation are drawn for each image.

    rng: utils.core.seed.StepRandom. The random numbers depend on (seed, step, sample), not on the process.
    """
    B, _, height, width = x.shape
    brightness, saturation, contrast, shift_y, shift_x = rng.rand(B, 5).unbind(1)

    def column(v):
        return v.reshape(B, 1, 1, 1)

    x = x + column(brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * column(2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * column(contrast + 0.5) + mean
    return translate(x, whole_shift(shift_y, height), whole_shift(shift_x, width))


def whole_shift(u, size):
    """Turn u in [0, 1) into an integer shift, uniform on [-s, s] with s = size/8 rounded."""
    s = int(size * TRANSLATION + 0.5)
    return (u * (2 * s + 1)).floor().long() - s


def translate(x, dy, dx):
    """Move image b by (dy[b], dx[b]) pixels. Pixels from outside the image are zero."""
    B, C, H, W = x.shape
    # One ring of zeros is enough, because every index outside the image is clamped onto the ring.
    padded = F.pad(x, (1, 1, 1, 1))
    rows = (torch.arange(H, device=x.device) + 1 - dy[:, None]).clamp(0, H + 1)
    cols = (torch.arange(W, device=x.device) + 1 - dx[:, None]).clamp(0, W + 1)
    batch = torch.arange(B, device=x.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def hinge_discriminator_loss(logits_real, logits_fake):
    """Return 0.5 (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(nll_gradient, g_gradient, maximum):
    """Return clamp(|grad nll| / (|grad g| + 1e-4), 0, maximum) of gradients at the last layer (VQGAN, eq. 7)."""
    ratio = nll_gradient.float().norm() / (g_gradient.float().norm() + ADAPTIVE_EPS)
    return ratio.clamp(0.0, maximum).detach()


def ramp(step, length):
    """Return a share that grows linearly from 0 at step 0 to 1 at step `length`. The share is 0 before and 1 after."""
    if step < 0:
        return 0.0
    return min(1.0, step / length) if length else 1.0


class LeCam(nn.Module):
    """LeCam regularisation of a discriminator D (Tseng et al. 2021, arXiv 2104.03310):

    mean((D(x) - a_fake)^2) + mean((D(x_hat) - a_real)^2). a_real and a_fake are moving averages of the means of D(x)
    and D(x_hat) over the images of all processes. Both averages begin at 0, because an untrained D has outputs near 0.
    """

    DECAY = 0.99  # the averages have the decay of the paper
    averages: torch.Tensor  # (2,): a_real, a_fake

    def __init__(self):
        super().__init__()
        self.register_buffer("averages", torch.zeros(2))

    def forward(self, logits_real, logits_fake):
        """Update the averages, and return the loss () of logits (B, 1, h, w)."""
        means = distributed.all_reduce_mean(torch.stack((logits_real.detach().mean(), logits_fake.detach().mean())))
        updated = self.averages.lerp(means, 1 - self.DECAY)
        self.averages = torch.where(means.isfinite(), updated, self.averages)  # skip an overflow of fp16
        return (logits_real - self.averages[1]).square().mean() + (logits_fake - self.averages[0]).square().mean()
