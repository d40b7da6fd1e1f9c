"""Redraws parts of pictures with the models of a command line, in batches and in any number of processes."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.common.codes import decode_batch, decode_in_tiles, encode_batch
from experiments.common.pictures import GREY
from models.canvas import complete_canvas, draws_per_canvas
from models.editing import blend, hide, random_cells, redraw, touched_cells
from utils.core import distributed
from utils.core.progress import Progress
from utils.core.seed import derive_seed, sample_uniforms
from utils.data.pixels import to_float, to_uint8

ENCODED = 16  # pictures that are encoded at once


class Edits:
    """All results of a command: picture after picture, and for each picture share after share with all variants. The
    number of a result counts in this order. The random numbers of a result depend on --seed, the picture and the
    variant only."""

    def __init__(
        self,
        H: Any,
        models: Any,
        pictures: Tensor,
        masks: Tensor | None,
        variants: int = 1,
        dilate: int = 0,
        blend: int | None = None,
        shares: Sequence[float] | None = None,
    ):
        """pictures uint8 (N, C, H, W); masks (N, H, W) bool, or None if shares of random cells are redrawn; variants:
        results for each picture (and share); dilate: cells around the mask that are redrawn, too; blend: the width in
        pixels of the edge with which kept pixels are pasted back, or None."""
        self.H, self.models, self.pictures, self.masks = H, models, pictures, masks
        self.variants, self.dilate, self.blend = variants, dilate, blend
        self.shares = shares or [1.0]
        self.columns = len(self.shares) * variants
        self.digests = [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in pictures]
        x = to_float(pictures)
        x = x if masks is None else hide(x, masks)
        self.ids = encode_parts(models, x.split(ENCODED)).cpu()

    def __len__(self) -> int:
        return len(self.pictures) * self.columns

    def numbers_of(self, number: int) -> tuple[int, float, int]:
        """The number of a result -> (number of the picture, share, variant)."""
        picture, column = divmod(number, self.columns)
        return picture, self.shares[column // self.variants], column % self.variants

    def uniforms(self, what: str, numbers: Iterable[int], shape: tuple[int, ...]) -> Tensor:
        """Random numbers of some results for one purpose, (n, *shape)."""
        rows = []
        for picture, _, variant in map(self.numbers_of, numbers):
            rows.append(sample_uniforms(derive_seed(what, self.H.seed, self.digests[picture]), [variant], shape))
        return torch.cat(rows).to(self.models.device)

    def sampler_uniforms(self, numbers: Iterable[int]) -> Tensor:
        return self.uniforms("edit", numbers, self.models.sampler.model.draws_per_sample())

    def cells(self, numbers: Iterable[int]) -> Tensor:
        """The cells of some results that are redrawn, (n, h, w) bool on the CPU."""
        (h, w), found = self.H.latent_shape[1:], []
        for number in numbers:
            picture, share, _ = self.numbers_of(number)
            if self.masks is not None:
                found.append(touched_cells(self.masks[picture : picture + 1], (h, w), self.dilate))
            else:
                found.append(random_cells(self.uniforms("cells", [number], (h, w)).cpu(), share))
        return torch.cat(found)

    def draw(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw some results -> (ids (n, L), pictures uint8 (n, C, H, W)), on the CPU."""
        of = [self.numbers_of(number)[0] for number in numbers]
        cells = self.cells(numbers)
        with self.models.precision.autocast():
            ids = self.complete(self.ids[of], cells, self.sampler_uniforms(numbers))
        drawn = self.decode(ids).cpu()
        if self.blend is not None:
            mask = to_pixels(cells, drawn.shape[-2:]) if self.masks is None else self.masks[of]
            drawn = to_uint8(blend(to_float(self.originals(of)), to_float(drawn), mask, self.blend))
        return ids.cpu(), drawn

    def originals(self, of: Sequence[int]) -> Tensor:
        """Some of the pictures, with the shape of the results: uint8 (n, C, H, W)."""
        return self.pictures[of]

    def complete(self, ids: Tensor, cells: Tensor, uniforms: Tensor) -> Tensor:
        """Draw cells (n, h, w) bool again, given the other codes of ids (n, L) -> ids (n, L) on the device."""
        device = self.models.device
        return redraw(self.models.sampler.model, ids.to(device), cells.to(device), uniforms, self.H.temp)

    def decode(self, ids: Tensor) -> Tensor:
        """The pictures of results, uint8 (n, C, H, W)."""
        return decode_batch(self.models.autoencoder.model, ids, self.H, self.models.precision)

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw all results and yield them as `draw` does, in order; only the main process gets them."""
        with Progress(len(self), "editing", "img", workers=distributed.world_size()) as progress:

            def share() -> Iterator[tuple[Tensor, Tensor]]:
                for numbers, of_all in distributed.turns(0, len(self), self.H.batch_size):
                    yield self.draw(numbers)
                    progress.update(of_all)

            yield from distributed.in_order(share())


class Outpaintings(Edits):
    """Results on canvases of H.shape codes. The picture is at the cell H.at. The sampler draws the other codes given
    those of the picture, which stay as they are. L is the number of codes of a canvas."""

    def sampler_uniforms(self, numbers: Iterable[int]) -> Tensor:
        return self.uniforms("outpaint", numbers, draws_per_canvas(self.models.sampler.model, self.H.shape))

    def place(self, parts: Tensor, canvases: Tensor) -> Tensor:
        """Write parts (n, ..., h, w), codes or pixels of the pictures, to their place on canvases (n, ..., H, W)."""
        scale = canvases.shape[-1] // self.H.shape[1]
        top, left = (scale * at for at in self.H.at)
        canvases[..., top : top + parts.shape[-2], left : left + parts.shape[-1]] = parts
        return canvases

    def cells(self, numbers: Iterable[int]) -> Tensor:
        n = len(list(numbers))
        inside = torch.zeros(n, *self.H.latent_shape[1:], dtype=torch.bool)
        return self.place(inside, torch.ones(n, *self.H.shape, dtype=torch.bool))

    def originals(self, of: Sequence[int]) -> Tensor:
        parts = self.pictures[of]
        scale = self.H.img_size // self.H.latent_shape[1]
        size = (scale * side for side in self.H.shape)
        return self.place(parts, parts.new_full((*parts.shape[:2], *size), round(255 * GREY)))

    def complete(self, ids: Tensor, cells: Tensor, uniforms: Tensor) -> Tensor:
        H, sampler, window = self.H, self.models.sampler.model, self.H.latent_shape[1:]
        known = self.place(ids.view(-1, *window), torch.full(cells.shape, sampler.mask_id))
        known = known.to(self.models.device)
        return complete_canvas(sampler, known, uniforms, window, H.temp, H.window_batch).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        H, ae = self.H, self.models.autoencoder.model
        canvases = ids.view(-1, *H.shape)
        return torch.stack([decode_in_tiles(ae, one, H.decode_tile, self.models.precision) for one in canvases])


def encode_parts(models: Any, parts: Iterable[Tensor]) -> Tensor:
    """The codes of pictures in parts, each (n, C, H, W) in [0, 1]: (N, L) on the device."""
    return torch.cat([encode_batch(models.autoencoder.model, part.to(models.device)) for part in parts])


def to_pixels(cells: Tensor, size: int | Sequence[int]) -> Tensor:
    """The pixels of cells: (n, h, w) -> (n, *size); a number is the size of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return cells.repeat_interleave(height // cells.shape[1], 1).repeat_interleave(width // cells.shape[2], 2)
