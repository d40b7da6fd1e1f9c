"""Draws pictures that explain the models. They show samples during sampling, and a mean image patch for each code."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.core import distributed
from utils.data.batches import local_batch
from utils.data.pixels import to_float, to_uint8
from utils.display.grids import fitted, labelled, write_gif, write_picture
from utils.display.images import enlarge, sheet, to_pillow

FRAMES = 8
SHOWN = 5  # the number of samples in the strip; the animation shows all samples
GREY = 0.55  # the value of pixels whose code is not known yet
PAPER = 200  # the space between the means of codes is grey, because many means are white


# ---------------------------------------------------------------------- denoising


@torch.no_grad()
def decode_canvas(ae: Any, ids: Tensor, mask_id: int, latent_shape: tuple[int, int], precision: Any) -> Tensor:
    """Decode codes (B, L), some of them masked -> uint8 (B, C, H, W). The cells of masked codes are grey.

    The decoder gets the mean vector of the codebook for each masked code.
    """
    h, w = latent_shape
    mask = (ids == mask_id).reshape(-1, 1, h, w)
    with precision.autocast():
        mean = ae.quantize.embed_ids(torch.arange(mask_id, device=ids.device)).mean(0)
        z = torch.where(mask, mean[:, None, None], ae.embed(ids.masked_fill(ids == mask_id, 0), h, w))
        x = ae.generator(z.contiguous()).float()
    cell = x.shape[-1] // w
    return to_uint8(torch.where(mask.repeat_interleave(cell, 2).repeat_interleave(cell, 3), GREY, x))


def states_of_sampling(
    sampler: Any, uniforms: Tensor, ids: Tensor, n: int, temp: float, unknown: Tensor | None = None
) -> Tensor:
    """Return the states of samples ids (B, L) at n evenly spaced times of sampling, from all masked to all known: (n,
    B, L). Codes that are not known yet are the sampler's mask_id. uniforms, temp: the random numbers and the
    temperature that sampler.sample got. unknown (B, L) bool: the codes that were drawn (default: all)."""
    shares = torch.linspace(0, 1, n, device=ids.device)
    revealed_at = sampler.revealed_at(ids, uniforms, temp, unknown)
    return ids.masked_fill(revealed_at > shares[:, None, None], sampler.mask_id)


def show_denoising(
    report: Any, H: Any, models: Any, ids: Tensor, uniforms: Tensor, name: str, unknown: Tensor | None = None
) -> None:
    """Write a strip of the first samples in FRAMES frames, <name>.png, and an animation of all samples, <name>.gif.

    ids (N, L): the samples; uniforms: the random numbers that the sampler got; unknown (N, L) bool: the codes that were
    drawn (default: all).
    """
    sampler, ae = models.sampler.model, models.autoencoder.model
    frames = []
    with models.precision.autocast():
        states = states_of_sampling(sampler, uniforms, ids.to(models.device), FRAMES, H.temp, unknown)
    for canvas in states:
        parts = [
            decode_canvas(ae, part, sampler.mask_id, H.latent_shape[1:], models.precision).cpu()
            for part in canvas.split(H.batch_size)
        ]
        frames.append(torch.cat(parts))
    rows = [[fitted(to_pillow(frame[i])) for frame in frames] for i in range(min(SHOWN, len(ids)))]
    strip = labelled(rows, column_labels=[f"{100 * i / (FRAMES - 1):.0f}%" for i in range(FRAMES)])
    write_picture(report.pictures.place(f"{name}.png"), strip)
    write_gif(report.pictures.place(f"{name}.gif"), [to_pillow(enlarge(sheet(frame), 256)) for frame in frames])
    caption = f"{name}, by the completed share of sampling"
    report.dashboard.image("denoising", np.asarray(strip).transpose(2, 0, 1), caption)


# ---------------------------------------------------------------------- codebook


class CodeMeans:
    """Computes a mean image patch for each of K codes, over all positions that use the code. A patch contains the cell
    of its position and a border of half a cell.

    (A decoded canvas of a single code shows little, because the decoder was not trained on such canvases.)
    """

    def __init__(self, codebook_size: int, n_channels: int, cell: int, device: torch.device) -> None:
        """Begin with zero sums. cell: the side of a code's cell in pixels."""
        self.cell, self.half = cell, cell // 2
        side = cell + 2 * self.half
        self.shape = (n_channels, side, side)
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)
        # Sums of integers are the same for any order of the images, and for any number of processes.
        self.sums = torch.zeros(codebook_size, math.prod(self.shape), dtype=torch.int64, device=device)

    def add(self, x: Tensor, ids: Tensor) -> None:
        """Add images in [0, 1], (B, C, H, W), and their codes (B, L)."""
        padded = F.pad(x, (self.half,) * 4, mode="replicate")
        patches = F.unfold(padded, self.shape[1], stride=self.cell)  # (B, C side^2, L)
        patches, ids = patches.transpose(1, 2).flatten(0, 1), ids.flatten()
        self.sums.index_add_(0, ids, (255 * patches).round().long())
        self.counts.index_add_(0, ids, torch.ones_like(ids))

    def share(self) -> None:
        """Add up the sums and counts of all processes. All processes must call this method."""
        distributed.all_reduce_sum(self.sums)
        distributed.all_reduce_sum(self.counts)

    def sheet(self) -> Tensor:
        """Draw one picture, uint8 (C, h, w). The most used codes come first, and unused codes are white at the end."""
        means = self.sums / (255 * self.counts.clamp(min=1))[:, None]
        means[self.counts == 0] = 1.0
        order = self.counts.argsort(descending=True, stable=True)
        return sheet(to_uint8(means[order].view(-1, *self.shape)), padding=1, background=PAPER)

    def caption(self) -> str:
        used = int((self.counts > 0).sum())
        return f"mean of the pixels of each code, most used codes first; {used} of {len(self.counts)} used"


@torch.no_grad()
def code_means(ae: Any, images: Tensor, H: Any, precision: Any) -> CodeMeans:
    """Compute the CodeMeans of images, uint8 (N, C, H, W) on the autoencoder's device."""
    means = CodeMeans(H.codebook_size, H.n_channels, H.img_size // H.latent_shape[1], images.device)
    for batch in images.split(local_batch(H)):
        x = to_float(batch)
        with precision.autocast():
            ids = ae.encode(x)
        means.add(x, ids)
    return means
