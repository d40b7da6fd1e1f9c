"""Images larger than those of training: one canvas of codes, read through sliding windows.

Shapes: B canvases of H x W codes, windows of h x w (the size of training), K codes.
"""

import torch

from models.samplers.base import invert_cdf


def covering_windows(row, col, canvas, window):
    """Top left corners of all windows (stride 1) on the canvas that cover a cell: list of (top, left)."""
    (H, W), (h, w) = canvas, window
    tops = range(max(0, row - h + 1), min(row, H - h) + 1)
    lefts = range(max(0, col - w + 1), min(col, W - w) + 1)
    return [(top, left) for top in tops for left in lefts]


@torch.no_grad()
def sample_canvas(sampler, uniforms, window, temp=0.8, max_batch=256, progress=None):
    """Fill canvases of codes in raster order, one cell a step.

    At each cell the windows that cover it predict it, their probabilities are averaged, sharpened to
    p^(1/temp) and renormalised, and the code is drawn (the paper's larger-than-training images).
    Only the windows that cover the cell are evaluated, and only there.

    uniforms (B, H, W) in [0, 1), one for each cell; window (h, w) with h*w = the sampler's block size;
    max_batch: windows in one network pass. Returns ids (B, H, W) int64.
    Raises ValueError where the canvas is smaller than a window.
    """
    B, H, W = uniforms.shape
    h, w = window
    if h > H or w > W:
        raise ValueError(f"a canvas of {H} x {W} codes is smaller than the {h} x {w} of training")
    ids = torch.full((B, H, W), sampler.mask_id, dtype=torch.int64, device=uniforms.device)
    for cell in (progress or iter)(range(H * W)):
        row, col = divmod(cell, W)
        probs = window_probabilities(sampler, ids, row, col, window, max_batch)
        sharpened = (probs.log() / temp).softmax(-1)
        ids[:, row, col] = invert_cdf(sharpened, uniforms[:, row, col])
    return ids


def window_probabilities(sampler, ids, row, col, window, max_batch):
    """Mean over the covering windows of the predicted distribution at a cell, (B, K) float32."""
    B, (h, w) = len(ids), window
    corners = covering_windows(row, col, ids.shape[1:], window)
    total = 0.0
    for start in range(0, len(corners), max(1, max_batch // B)):
        chunk = corners[start : start + max(1, max_batch // B)]
        views = torch.stack([ids[:, top : top + h, left : left + w] for top, left in chunk])  # (n, B, h, w)
        inside = torch.tensor([(row - top) * w + col - left for top, left in chunk], device=ids.device)
        at = (torch.arange(len(chunk) * B, device=ids.device), inside.repeat_interleave(B))
        logits = sampler._denoise_fn(views.reshape(-1, h * w), at=at)
        total = total + logits.float().softmax(-1).view(len(chunk), B, -1).sum(0)
    return total / len(corners)
