"""Convolutional blocks of the autoencoder, and functions that several networks use.

Shapes: B images, C channels, h x w pixels or latents.
The names of parameters are those of the published checkpoints. Do not rename parameters.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NORM_GROUPS = 32


def group_norm(channels):
    """Return a GroupNorm with the 32 groups and the epsilon of the published model."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)


class Downsample(nn.Module):
    """Halves the resolution, (B, C, h, w) -> (B, C, h/2, w/2): padding at the right and bottom, strided convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution, (B, C, h, w) -> (B, C, 2h, 2w): nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Pre-activation residual block, (B, C_in, h, w) -> (B, C_out, h, w).

    `conv_out` is used only if the numbers of channels differ. `conv_out` always exists, because the published
    checkpoints always hold its weights.
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
        # (B, C, h, w) -> (B, 1, h*w, C). There is one head of width C, so the scale is C^-0.5.
        q, k, v = (f(normed).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        out = attention(q, k, v).squeeze(1).transpose(1, 2).reshape(B, C, h, w)
        return x + self.proj_out(in_layout_of(x, out))


def attention(q, k, v, dropout_p=0.0, is_causal=False):
    """Return softmax(q k^T / sqrt(d)) v with q (B, N, Q, d), k and v (B, N, L, d).

    The function uses the fastest implementation. PyTorch's fused kernel is the fastest, except on a CPU in bf16. On a
    CPU in bf16 the fused kernel computes the attention matrix in float32. It then takes twice as long (measured forward
    and backward, B 8, N 8, L 256, d 64). In this case, this function computes the matrix explicitly if the matrix fits
    into the processor's cache.
    """
    written_out = q.dtype == torch.bfloat16 and q.device.type == "cpu" and not is_causal and k.shape[-2] <= 1024
    if not written_out:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return F.dropout(weights, dropout_p) @ v


def in_layout_of(x, y):
    """Return y (B, C, h, w) in the memory format of x, which is channels last or contiguous.

    PyTorch would treat a transposed y, and all tensors computed from y, as channels last. On a CPU in bf16, the
    gradient of GroupNorm takes 80 times as long for channels last.
    """
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def run_blocks(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def in_parts(parts, module, *inputs):
    """Return module(*inputs), inputs (B, ...), for batches larger than the memory. Each row of the result must depend
    only on the same row of the inputs.

    With parts > 1, the forward and the backward pass process B/parts rows at a time. The backward pass computes each
    part once more, so the activations of only one part are kept. All other operations of the step see the complete
    batch, so batch norms and means over the batch do not change.
    """
    if parts == 1:
        return module(*inputs)
    chunks = zip(*(x.chunk(parts) for x in inputs), strict=True)
    # The modules use no randomness. The second computation therefore needs no saved states of random generators.
    return torch.cat([checkpoint(module, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
