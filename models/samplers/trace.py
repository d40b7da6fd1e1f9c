"""Reconstructs how samples were drawn without drawing them again: which codes were known at a given time.

The time at which a code is revealed does not depend on the network. It is fixed, or depends only on the uniforms that
the sample was drawn with. These and the final codes give all canvases in between. Shapes: B samples, L tokens.
"""

import torch

from models.samplers.reveal import reveal_times


def revealed_at(sampler, uniforms):
    """The completed share of sampling at which each token is revealed: uniforms (B, ...) -> (B, L) in (0, 1].

    uniforms: as sampler.sample was given. Diffusion goes from t = S to 1, and reveals token i at
    t = floor(S u_i) + 1, u the first of its two draws; autoregressive sampling goes from left to right.
    Raises ValueError for sample_type mlm, which masks and redraws codes many times.
    """
    if sampler.needs_raster_order:
        share = torch.arange(1, uniforms.shape[-1] + 1, device=uniforms.device) / uniforms.shape[-1]
        return share.expand(len(uniforms), -1)
    if uniforms.ndim != 3:
        raise ValueError("--sample_type mlm draws codes again: it has no steps to show; use diffusion")
    return (sampler.S + 1 - reveal_times(uniforms[:, 0], sampler.S)) / sampler.S


def canvases(sampler, uniforms, ids, n):
    """n canvases of samples at evenly spaced times, from all masked to all known: ids (B, L) -> (n, B, L), with the
    sampler's mask_id for codes that are not known yet."""
    shares = torch.linspace(0, 1, n, device=ids.device)
    masked = revealed_at(sampler, uniforms) > shares[:, None, None]
    return ids.masked_fill(masked, sampler.mask_id)
