"""PatchGAN discriminator (Isola et al. 2017): one realness score for each patch."""

import torch
from torch import nn

from utils.core import distributed


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics cover the images of all processes.

    (nn.SyncBatchNorm does the same, but runs only on CUDA.)
    """

    # Not None, as they can be in nn.BatchNorm2d.
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def forward(self, x):
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        x = x.float()  # as under autocast: sums over many pixels
        mean = distributed.mean_with_gradient(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = distributed.mean_with_gradient(centred.square().mean((0, 2, 3)))
        # The running statistics are those of nn.BatchNorm2d, with the unbiased estimate of the variance.
        count = x[:, 0].numel() * distributed.world_size()
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


class Discriminator(nn.Module):
    """(B, C, H, W) -> (B, 1, h', w'). Module order and names are those of the published checkpoints."""

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
