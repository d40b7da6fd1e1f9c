"""The plain forms of the program's jobs: they follow the definitions and save no work. tests/models/test_plain.py
compares the fast forms with them, and experiments/benchmark.py times both.

All compute in float32. Each attention has its complete matrix of weights, and each network computes all positions at
every step.
"""

import contextlib
import itertools
import math
from unittest import mock

import torch
import torch.nn.functional as F

from models.discriminator import adaptive_weight, diff_augment, hinge_discriminator_loss
from models.samplers.base import draw_codes, invert_cdf
from train_vqgan import reconstruction_nll


def _attention(q, k, v, dropout_p=0.0, is_causal=False, scale=None):
    """softmax(q k^T / sqrt(d)) v with q, k, v (..., L, d)."""
    weights = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        L = q.shape[-2]
        allowed = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
        weights = weights.masked_fill(~allowed, -math.inf)
    return F.dropout(weights.softmax(-1), dropout_p) @ v


@contextlib.contextmanager
def explicit_attention():
    """Within it PyTorch's fused attention is the formula written out."""
    with mock.patch.object(F, "scaled_dot_product_attention", _attention):
        yield


# ---------------------------------------------------------------------- stage 1


def vqgan_step(vqgan, optimisers, ema, H, x, step, rng):
    """One update of autoencoder, discriminator and averages: the losses differentiated as they are written, so that
    LPIPS and the discriminator are back-propagated once for the adaptive weight and once for the update, and the
    discriminator runs from the first step on. Returns {name: float}."""
    ae_optim, disc_optim = optimisers
    with explicit_attention():
        x_hat, quantized = vqgan.ae(x, step=step, rng=rng)
        nll, l1, perceptual = reconstruction_nll(x, x_hat, vqgan.perceptual, H.perceptual_weight)
        g_loss = -vqgan.disc(diff_augment(x_hat, rng) if H.diff_aug else x_hat).mean()
        last = vqgan.ae.generator.last_layer
        (at_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
        (at_g,) = torch.autograd.grad(g_loss, last, retain_graph=True)
        d_weight = adaptive_weight(at_nll, at_g, H.disc_weight_max) * (step >= H.disc_start_step)
        loss = nll + d_weight * g_loss + quantized.loss
        ae_optim.zero_grad()
        loss.backward()
        ae_optim.step()
    scalars = dict(loss=loss, l1=l1, perceptual=perceptual, nll_loss=nll, codebook_loss=quantized.loss)
    if step > H.disc_start_step:
        x_hat = x_hat.detach()
        real, fake = (diff_augment(x, rng), diff_augment(x_hat, rng)) if H.diff_aug else (x, x_hat)
        d_loss = hinge_discriminator_loss(vqgan.disc(real), vqgan.disc(fake))
        disc_optim.zero_grad()
        d_loss.backward()
        disc_optim.step()
        scalars.update(g_loss=g_loss, d_weight=d_weight, d_loss=d_loss)
    update_average(ema, vqgan, H.ema_beta)
    return {name: value.item() for name, value in scalars.items()}


@torch.no_grad()
def update_average(average, model, beta):
    """One parameter after the other."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        if a is not p:
            a.mul_(beta).add_(p, alpha=1 - beta)


# ---------------------------------------------------------------------- stage 2


def sampler_step(sampler, optimiser, ema, H, ids, rng):
    """One update of the absorbing diffusion on ids (B, L), logits computed everywhere. Returns the loss."""
    B, L = ids.shape
    t = (rng.rand(B) * sampler.T).long() + 1
    mask = sampler.mask_of(t, rng.rand(B, L))
    with explicit_attention():
        logits = sampler._denoise_fn(ids.masked_fill(mask, sampler.mask_id))
        ce = F.cross_entropy(logits.permute(0, 2, 1), ids.masked_fill(~mask, -1), ignore_index=-1, reduction="none")
        loss = ((1 - t / sampler.T) * ce.sum(1) / (math.log(2) * L)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    update_average(ema, sampler, H.ema_beta)
    return loss.item()


@torch.no_grad()
def sample_diffusion(sampler, uniforms, temp=1.0):
    """All S steps, with the complete batch and all logits at each. uniforms (B, 2, L): those of Sampler.sample."""
    with explicit_attention():
        return sampler.sample_plainly(uniforms, temp)


@torch.no_grad()
def sample_autoregressive(sampler, uniforms, temp=1.0):
    """For each token, the network computes the complete prefix. uniforms (B, L)."""
    B, L = uniforms.shape
    ids = torch.zeros(B, 0, dtype=torch.int64, device=uniforms.device)
    with explicit_attention():
        for i in range(L):
            padded = torch.cat((ids, ids.new_zeros(B, 1)), 1)  # the last one is not seen
            ids = torch.cat((ids, draw_codes(sampler.net(padded)[:, -1], uniforms[:, i], temp)[:, None]), 1)
    return ids


@torch.no_grad()
def nll(sampler, ids, rng):
    """The bound by one pass for each time step, all logits computed. ids (B, L) -> (B,) in nats."""
    total = torch.zeros(len(ids), device=ids.device)
    with explicit_attention():
        for t in range(sampler.T, 0, -1):
            mask = rng.rand(*ids.shape) < t / sampler.T
            logits = sampler._denoise_fn(ids.masked_fill(mask, sampler.mask_id))
            target = ids.masked_fill(~mask, -1)
            total += F.cross_entropy(logits.permute(0, 2, 1), target, ignore_index=-1, reduction="none").sum(1) / t
    return total


# ---------------------------------------------------------------------- pictures


@torch.no_grad()
def sample_canvas(sampler, u, window, temp):
    """One canvas (H, W) in raster order: at each cell all its windows, whether they cover the cell or not."""
    (H, W), (h, w) = u.shape, window
    ids = torch.full(u.shape, sampler.mask_id, device=u.device)
    corners = list(itertools.product(range(H - h + 1), range(W - w + 1)))
    with explicit_attention():
        for row, col in itertools.product(range(H), range(W)):
            views = torch.stack([ids[top : top + h, left : left + w].flatten() for top, left in corners])
            probs = sampler._denoise_fn(views).softmax(-1)
            covering = [
                probs[n, (row - top) * w + col - left]
                for n, (top, left) in enumerate(corners)
                if top <= row < top + h and left <= col < left + w
            ]
            sharpened = torch.stack(covering).mean(0) ** (1 / temp)
            ids[row, col] = invert_cdf(sharpened, u[row, col])
    return ids


@torch.no_grad()
def lpips_distances(model, queries, images):
    """LPIPS called pair by pair: queries (Q, C, H, W) and images (N, C, H, W) in [0, 1] -> (Q, N)."""
    return torch.tensor([[model(2 * q[None] - 1, 2 * x[None] - 1).item() for x in images] for q in queries])
