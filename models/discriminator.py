"""PatchGAN discriminator (Isola et al. 2017): one realness score for each patch."""

from torch import nn


class Discriminator(nn.Module):
    """(B, C, H, W) -> (B, 1, h', w'). Module order and names are those of the published checkpoints."""

    def __init__(self, n_channels, ndf, n_layers):
        super().__init__()
        layers = [nn.Conv2d(n_channels, ndf, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, n_layers + 1):
            c_in, width = width, ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(c_in, width, kernel_size=4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, kernel_size=4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x)
