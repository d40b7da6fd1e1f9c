"""Draws images that are larger than the training images. Sliding windows read one canvas of codes.

Shapes: B canvases of H x W codes, windows of h x w (the size of training), K codes. Each step draws n cells, with N
windows and Q readings in total. A reading is the prediction of one cell by one window. The number of a cell is
row * W + column.
"""

import math
from functools import partial

import numpy as np
import torch

from models.fast import frozen
from models.samplers.base import draw_codes, no_progress, temperature
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
    check_size((H, W), window)
    if sampler.needs_raster_order and (order is not None or cells_per_step > 1):
        raise ValueError("this sampler needs raster order, one cell a step")
    ids = torch.full((B, H * W), sampler.mask_id, dtype=torch.int64, device=uniforms.device)
    if order is None:
        sequence = np.tile(np.arange(H * W), (B, 1))
    else:
        sequence = order.flatten(1).argsort(dim=1, stable=True).cpu().numpy()
    parts = [sequence[:, start : start + cells_per_step] for start in range(0, H * W, cells_per_step)]
    steps = [(i, np.arange(B).repeat(part.shape[1]), part.ravel()) for i, part in enumerate(parts)]

    def draw(step, logits, u):
        now = temperature(temp, temp_end, step / max(len(steps) - 1, 1), ids.device)
        return draw_codes(logits, u, now, top_k, top_p)

    reader = WindowReader(sampler, (H, W), window, max_batch)
    return fill(reader, ids, steps, uniforms.flatten(1), draw, progress).view(B, H, W)


@torch.no_grad()
def complete_canvas(sampler, known, uniforms, window, temp=1.0, max_batch=256, progress=no_progress):
    """Draw the unknown cells of canvases, given the known cells, which stay as they are.

    This is the procedure of AbsorbingDiffusion.sample on a larger grid, with the same settings (order, schedule,
    remasking, ...). The predictions are those of `sample_canvas`.

    sampler: an AbsorbingDiffusion that reveals each code once or masks it again; known (B, H, W): ids, with mask_id
    where a code is to be drawn; uniforms (B, *draws_per_canvas(sampler, (H, W))); the others: as for `sample_canvas`.
    Returns ids (B, H, W) int64. Raises ValueError if the canvas is smaller than a window.
    """
    B, *shape = known.shape
    check_size(shape, window)
    ids, reader = known.flatten(1), WindowReader(sampler, shape, window, max_batch)
    if uniforms.ndim == 4:  # new random numbers for each time: all cells must be predicted at all times
        with frozen(sampler):
            ids = sampler.sample_plainly(uniforms, temp, progress, ids, grid=shape, net=reader.logits_of_unknown)
        return ids.view_as(known)
    order_u, code_u = uniforms.unbind(1)
    times = sampler.order_of(order_u.cpu(), (ids == sampler.mask_id).cpu(), shape).times().numpy()
    steps = [(t, *np.nonzero(times == t)) for t in np.unique(times)[::-1].tolist() if t > 0]
    return fill(reader, ids.clone(), steps, code_u, partial(sampler.draw_at, temp=temp), progress).view_as(known)


def draws_per_canvas(sampler, shape):
    """Shape of the uniforms in [0, 1) that `complete_canvas` needs for a canvas of `shape`."""
    return (*sampler.draws_per_sample()[:-1], math.prod(shape))


def check_size(shape, window):
    (H, W), (h, w) = shape, window
    if h > H or w > W:
        raise ValueError(f"a canvas of {H} x {W} codes is smaller than the {h} x {w} of training")


def fill(reader, ids, steps, uniforms, draw, progress):
    """Draw cells of canvases ids (B, H*W), in place. Returns ids.

    steps: a list of (t, rows, cells), the cells that one step draws: their canvases and numbers (n,); uniforms (B,
    H*W); draw: a function of t, logits (n, K) and uniforms (n,) that returns ids (n,).
    """
    with frozen(reader.sampler):
        for t, rows, cells in progress(steps):
            logits = reader.logits(ids, rows, cells)
            at = tuple(send(torch.from_numpy(index), ids.device) for index in (rows, cells))
            ids[at] = draw(t, logits, uniforms[at])
    return ids


class WindowReader:
    """Predicts cells of canvases of `shape` (H, W) by all windows that cover them. max_batch: the number of windows in
    one network pass."""

    def __init__(self, sampler, shape, window, max_batch):
        self.sampler, self.shape, self.window, self.max_batch = sampler, tuple(shape), window, max_batch

    def logits(self, ids, rows, cells):
        """Return the logarithm of the mean over all windows of the distributions at cells (n,) of canvases rows (n,):
        (n, K) float32. ids (B, H*W); rows and cells are arrays.

        The windows are computed on the CPU, because their number depends on the cells. Nothing waits for an
        accelerator.
        """
        (h, w), size = self.window, self.max_batch
        corners, readings = needed_windows(rows, cells, self.shape, self.window)
        # (B, H-h+1, W-w+1, h, w), nothing copied
        views = ids.view(-1, *self.shape).unfold(1, h, 1).unfold(2, w, 1)
        # A sum of integers does not depend on the order of its terms. The result is therefore the same for any grouping
        # of windows into passes, and for any order of the threads of a GPU.
        total = torch.zeros(cells.size, self.sampler.codebook_size, dtype=torch.int64, device=ids.device)
        # The readings are sorted by window, so the readings of one pass are adjacent.
        sizes = np.bincount(readings[:, 1] // size).tolist()
        passes, readings = (send(torch.from_numpy(rows), ids.device) for rows in (corners, readings))
        for some, at in zip(passes.split(size), readings.split(sizes), strict=True):
            cell, number, position = at.unbind(1)
            logits = self.sampler.predict(views[some.unbind(1)].flatten(1), number % size, position)
            probs = logits.float().softmax(-1)
            total.index_add_(0, cell, (probs * FIXED_POINT).round().long())
        return (total.float() / total.sum(1, keepdim=True).float()).log()

    def logits_of_unknown(self, ids):
        """Return the logits of all cells of ids (B, H*W): (B, H*W, K). Those of the known cells are 0."""
        unknown = ids == self.sampler.mask_id
        logits = torch.zeros(*ids.shape, self.sampler.codebook_size, device=ids.device)
        if unknown.any():
            logits[unknown] = self.logits(ids, *unknown.cpu().numpy().nonzero())
        return logits


def needed_windows(rows, cells, canvas, window):
    """Find the windows on canvases (H, W) that cover any of the cells (n,) of the canvases rows (n,), and the positions
    of the cells inside. All arrays are int64 numpy arrays.

    Returns corners (N, 3) int64 and readings (Q, 3) int64. Each window has one row (number of the canvas, top, left) in
    corners. Each row of readings is (index in cells, number of the window, position in the window), and the rows are
    sorted by window.
    """
    (H, W), (h, w) = canvas, window
    inside = np.arange(h * w)
    top = (cells // W)[..., None] - inside // w  # (n, h*w): the top of the window with the cell at this position
    left = (cells % W)[..., None] - inside % w
    fits = (top >= 0) & (top <= H - h) & (left >= 0) & (left <= W - w)
    cell, position = np.nonzero(fits)
    keys, number = np.unique((rows[cell] * H + top[fits]) * W + left[fits], return_inverse=True)
    corners = np.stack((keys // (H * W), keys // W % H, keys % W), axis=1)
    readings = np.stack((cell, number, position), axis=1)
    return corners, readings[number.argsort(kind="stable")]
