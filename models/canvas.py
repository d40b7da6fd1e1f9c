"""Draws images that are larger than the training images. Sliding windows read one canvas of codes.

Shapes: B canvases of H x W codes, windows of h x w (the size of training), K codes. Each step draws C cells per
canvas, with N windows and Q readings in total. A reading is the prediction of one cell by one window. The number of a
cell is row * W + column.
"""

import numpy as np
import torch

from models.fast import frozen
from models.samplers.base import invert_cdf, no_progress, temperature, tempered, truncated
from utils.core.device import send

FIXED_POINT = 2.0**46  # this integer stands for the probability 1; 2^16 such integers sum to less than 2^63


@torch.no_grad()
def sample_canvas(
    sampler,
    uniforms,
    window,
    temp=0.8,
    max_batch=256,
    progress=no_progress,
    order=None,
    cells_per_step=1,
    temp_end=None,
    top_k=0,
    top_p=1.0,
):
    """Fill canvases of codes, some cells per step. The paper's images larger than the training images use this method.

    All windows (stride 1) that cover a cell predict the cell from the state before the step. Their probabilities are
    averaged, raised to the power 1/temp and truncated to the most probable codes (models.samplers.base.truncated). Then
    the code is drawn.

    uniforms (B, H, W) in [0, 1), one for each cell; window (h, w) with h*w = the sampler's block size;
    max_batch: number of windows in one network pass, which limits the memory; progress: a function that gets the
    steps and returns an iterable of the steps; order (B, H, W): each canvas fills its cells in ascending order of
    these numbers (default: raster order); cells_per_step: number of cells that a canvas fills in one step;
    temp_end: the temperature at the last step (default: temp; the temperature changes linearly).
    A canvas depends only on its own row of uniforms and order. Returns ids (B, H, W) int64.
    Raises ValueError if the canvas is smaller than a window, or if the sampler needs raster order.
    """
    B, H, W = uniforms.shape
    h, w = window
    if h > H or w > W:
        raise ValueError(f"a canvas of {H} x {W} codes is smaller than the {h} x {w} of training")
    if sampler.needs_raster_order and (order is not None or cells_per_step > 1):
        raise ValueError("this sampler needs raster order, one cell a step")
    ids = torch.full((B, H, W), sampler.mask_id, dtype=torch.int64, device=uniforms.device)
    if order is None:
        sequence = np.tile(np.arange(H * W), (B, 1))
    else:
        sequence = order.flatten(1).argsort(dim=1, stable=True).cpu().numpy()
    steps = [sequence[:, start : start + cells_per_step] for start in range(0, H * W, cells_per_step)]
    with frozen(sampler):
        for step, cells in enumerate(progress(steps)):
            now = temperature(temp, temp_end, step / max(len(steps) - 1, 1), ids.device)
            probs = cell_probabilities(sampler, ids, cells, window, max_batch)
            sharpened = truncated(tempered(probs.log(), now), top_k, top_p)
            at = send(torch.from_numpy(cells), ids.device)
            ids.view(B, -1).scatter_(1, at, invert_cdf(sharpened, uniforms.flatten(1).gather(1, at)))
    return ids


def cell_probabilities(sampler, ids, cells, window, max_batch):
    """Return the distributions at cells (B, C), averaged over all windows that cover a cell: (B, C, K) float32.

    cells: an array. The windows are computed on the CPU, because their number depends on the cells. Nothing waits for
    an accelerator.
    """
    h, w = window
    corners, readings = needed_windows(cells, ids.shape[1:], window)
    views = ids.unfold(1, h, 1).unfold(2, w, 1)  # (B, H-h+1, W-w+1, h, w), nothing copied
    # A sum of integers does not depend on the order of its terms. The result is therefore the same for any grouping of
    # windows into passes, and for any order of the threads of a GPU.
    total = torch.zeros(cells.size, sampler.codebook_size, dtype=torch.int64, device=ids.device)
    # The readings are sorted by window, so the readings of one pass are adjacent.
    sizes = np.bincount(readings[:, 1] // max_batch).tolist()
    passes, readings = (send(torch.from_numpy(rows), ids.device) for rows in (corners, readings))
    for some, at in zip(passes.split(max_batch), readings.split(sizes), strict=True):
        cell, number, position = at.unbind(1)
        logits = sampler.predict(views[some.unbind(1)].flatten(1), number % max_batch, position)
        probs = logits.float().softmax(-1)
        total.index_add_(0, cell, (probs * FIXED_POINT).round().long())
    mean = total.float() / total.sum(1, keepdim=True).float()
    return mean.view(*cells.shape, -1)


def needed_windows(cells, canvas, window):
    """Find the windows on a canvas (H, W) that cover any of the cells (B, C), and the positions of the cells inside.
    All arrays are int64 numpy arrays.

    Returns corners (N, 3) int64 and readings (Q, 3) int64. Each window has one row (number of the canvas, top, left) in
    corners. Each row of readings is (cell as b * C + c, number of the window, position in the window), and the rows are
    sorted by window.
    """
    (H, W), (h, w) = canvas, window
    B, C = cells.shape
    inside = np.arange(h * w)
    top = (cells // W)[..., None] - inside // w  # (B, C, h*w): the top of the window with the cell at this position
    left = (cells % W)[..., None] - inside % w
    fits = (top >= 0) & (top <= H - h) & (left >= 0) & (left <= W - w)
    b, c, position = np.nonzero(fits)
    keys, number = np.unique((b * H + top[fits]) * W + left[fits], return_inverse=True)
    corners = np.stack((keys // (H * W), keys // W % H, keys % W), axis=1)
    readings = np.stack((b * C + c, number, position), axis=1)
    return corners, readings[number.argsort(kind="stable")]
