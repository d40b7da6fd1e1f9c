"""Convolutional blocks of the autoencoder.

Shapes: B images, C channels, h x w pixels or latents.
Parameter names are those of the published checkpoints: do not rename.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.fast import attention

NORM_GROUPS = 32


def group_norm(channels):
    """GroupNorm with the 32 groups and the epsilon of the published model."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2). Pads right and bottom only, then a strided convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Pre-activation residual block, (B, C_in, h, w) -> (B, C_out, h, w).

    `conv_out` is used only if the numbers of channels differ. It always exists, because the published
    checkpoints always hold it.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = group_norm(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.conv_out = nn.Conv2d(c_in, c_out, kernel_size=1)
        self.project_skip = c_in != c_out

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_out(x) if self.project_skip else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the h*w positions, with a residual connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x):
        B, C, h, w = x.shape
        normed = self.norm(x)
        # (B, C, h, w) -> (B, 1, h*w, C): one head of width C, so the scale is C^-0.5
        q, k, v = (f(normed).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        out = attention(q, k, v).squeeze(1).transpose(1, 2).reshape(B, C, h, w)
        return x + self.proj_out(in_layout_of(x, out))


def in_layout_of(x, y):
    """y (B, C, h, w) in the memory format of x: channels last, or contiguous.

    A transposed y would count as channels-last, and so would everything computed from it. GroupNorm's gradient for
    that layout takes 80 times as long on a CPU in bf16.
    """
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def run_blocks(blocks, x):
    for block in blocks:
        x = block(x)
    return x
