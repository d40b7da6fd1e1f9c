"""The VQ autoencoder: images -> latents -> discrete codes -> images (Esser et al. 2021, VQGAN).

Shapes: B images, C image channels, h x w latents, E = emb_dim, K = codebook_size.
"""

import math

import torch
from torch import nn

from models.layers import AttnBlock, Downsample, ResBlock, Upsample, conv3x3, group_norm, in_parts, run_blocks


class Encoder(nn.Module):
    """Turns images into latents: (B, C, H, W) in [0, 1] -> (B, E, h, w)."""

    def __init__(self, n_channels, nf, emb_dim, ch_mult, res_blocks, img_size, attn_resolutions):
        super().__init__()
        blocks = [conv3x3(n_channels, nf)]
        width, resolution = nf, img_size
        for level, mult in enumerate(ch_mult):
            for _ in range(res_blocks):
                blocks.append(ResBlock(width, nf * mult))
                width = nf * mult
                if resolution in attn_resolutions:
                    blocks.append(AttnBlock(width))
            if level < len(ch_mult) - 1:
                blocks.append(Downsample(width))
                resolution //= 2
        blocks += [ResBlock(width, width), AttnBlock(width), ResBlock(width, width)]
        # Like the published model, there is no activation between the norm and the last convolution.
        blocks += [group_norm(width), conv3x3(width, emb_dim)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        return run_blocks(self.blocks, x)


class Generator(nn.Module):
    """Turns latents into images, (B, E, h, w) -> (B, C, H, W). A second head predicts the variance of the pixels."""

    def __init__(self, n_channels, nf, emb_dim, ch_mult, res_blocks, img_size, attn_resolutions):
        super().__init__()
        width = nf * ch_mult[-1]
        resolution = img_size // 2 ** (len(ch_mult) - 1)
        blocks = [conv3x3(emb_dim, width), ResBlock(width, width), AttnBlock(width), ResBlock(width, width)]
        for level, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(res_blocks):
                blocks.append(ResBlock(width, nf * mult))
                width = nf * mult
                if resolution in attn_resolutions:
                    blocks.append(AttnBlock(width))
            if level > 0:
                blocks.append(Upsample(width))
                resolution *= 2
        blocks += [group_norm(width), conv3x3(width, n_channels)]
        self.blocks = nn.ModuleList(blocks)
        self.logsigma = nn.Sequential(conv3x3(width, width), nn.ReLU(), nn.Conv2d(width, n_channels, kernel_size=1))

    @property
    def last_layer(self):
        """Return the weight of the last convolution. Its gradients determine the adaptive weight (VQGAN, eq. 7)."""
        return self.blocks[-1].weight

    def features(self, z):
        """Compute the input of the last convolution and of `logsigma`: (B, E, h, w) -> (B, nf, H, W)."""
        return run_blocks(self.blocks[:-1], z)

    def forward(self, z):
        return self.blocks[-1](self.features(z))

    def distribution(self, z):
        """Return the mean and the log standard deviation of each subpixel, both (B, C, H, W)."""
        features = self.features(z)
        return self.blocks[-1](features), self.logsigma(features)


def gaussian_nll(x, mean, logsigma):
    """Return -log N(x; mean, exp(logsigma)), summed over the subpixels: (B, C, H, W) -> (B,) in nats."""
    z = (x - mean) * torch.exp(-logsigma)
    return (0.5 * z.square() + logsigma + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


class VQAutoEncoder(nn.Module):
    """Combines an encoder, a quantizer (models.quantizers.Quantizer) and a generator."""

    def __init__(self, encoder, quantizer, generator):
        super().__init__()
        self.encoder = encoder
        self.quantize = quantizer
        self.generator = generator

    def forward(self, x, step=None, rng=None, parts=1):
        """Reconstruct images: x (B, C, H, W) in [0, 1] -> (x_hat of the same shape, quantizers.Quantized).

        step: the training step, for quantizers with a schedule; None: the state after training.
        parts: the number of parts of the batch that are computed one after the other (models.layers.in_parts)."""
        quantized = self.quantize(in_parts(parts, self.encoder, x), step=step, rng=rng)
        features = in_parts(parts, self.generator.features, quantized.z_q)
        return self.generator.blocks[-1](features), quantized

    def encode(self, x):
        """Encode images without randomness: x (B, C, H, W) in [0, 1] -> ids (B, h*w) int64, row by row."""
        return self.quantize.encode(self.encoder(x)).flatten(1)

    def embed(self, ids, h, w):
        """Return the vectors of codes: ids (B, h*w) -> z_q (B, E, h, w)."""
        return self.quantize.embed_ids(ids.reshape(-1, h, w)).permute(0, 3, 1, 2)

    def decode(self, ids, h, w):
        """Decode codes to images: ids (B, h*w) -> x (B, C, H, W). Some values of x can lie outside [0, 1]."""
        return self.generator(self.embed(ids, h, w).contiguous())
