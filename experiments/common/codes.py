"""Turns images into codes and codes into images. A cache keeps the codes of images."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from models.pretrained import Loaded, encode_batch
from models.tiles import decode_tiled
from utils.core import distributed
from utils.core.progress import Progress
from utils.data import codes
from utils.data.batches import Batch, one_pass
from utils.data.images import ImageSet, Say
from utils.data.pixels import to_float, to_uint8
from utils.training.amp import Precision

# The largest number of images and pixels that are encoded at once. 16 images of 256 x 256 pixels take about 2 GiB with
# the paper's autoencoder in float32. The --batch_size of stage 2 is not used here, because it is for codes.
ENCODED_IMAGES, ENCODED_PIXELS = 64, 1 << 20


def cached_codes(
    H: Any,
    images: ImageSet,
    split: str,
    autoencoder: Loaded,
    device: torch.device,
    say: Say,
    flip: bool = False,
) -> torch.Tensor:
    """Return the ids of an ImageSet, (N, L) int64 on the CPU. They come from the cache under latents/, or are computed.

    flip: encode the mirrored images. Images are encoded in float32 even with --amp, because in bf16 1% of the codes
    would differ. (A run of an earlier version keeps its first number format, which H.codes_precision records.)
    """
    precision = Precision(H.codes_precision == "amp", H.amp_dtype, device)
    header = dict(
        format=codes.FORMAT,
        dataset=H.dataset,
        split=split,
        flip=flip,
        autoencoder=autoencoder.hash,
        latent_shape=H.latent_shape,
        images=distributed.from_main(images.identity),
        precision=precision.describe(),
    )
    batch_size = encoded_at_once(H)
    what = f"encoding {split} images" + (f", crop {images.view[1]}" if images.view else "")
    what += " (mirrored)" if flip else ""

    def encode(positions: range) -> Iterator[torch.Tensor]:
        progress.skip_to(positions.start)
        batches = one_pass(images, batch_size, H.num_workers, flip, positions, shared=True, say=say)
        own = encode_batches(autoencoder.model, batches, device, precision, codes.ids_type(H.codebook_size))
        for ids in distributed.in_order(own):
            yield ids
            progress.update(len(ids))

    with Progress(len(images), what, "img", lazy=True) as progress:
        return codes.cached(header, images, H.codebook_size, batch_size, encode, say).long()


def encoded_at_once(H: Any) -> int:
    """Return the largest number of images that are encoded at once."""
    return min(ENCODED_IMAGES, max(1, ENCODED_PIXELS // H.img_size**2))


def encode_batches(
    ae: Any, batches: Iterable[Batch], device: torch.device, precision: Precision, dtype: torch.dtype
) -> Iterator[torch.Tensor | None]:
    """Yield the ids (B, L) of batches of images, in this type on the CPU. An empty batch gives None."""
    for x, _ in batches:
        yield encode_batch(ae, to_float(x.to(device)), precision).to(dtype).cpu() if len(x) else None


@torch.no_grad()
def decode_batch(ae: Any, ids: torch.Tensor, H: Any, precision: Precision) -> torch.Tensor:
    """Decode codes to images: ids (B, L) -> uint8 (B, C, H, W)."""
    with precision.autocast():
        return to_uint8(ae.decode(ids, *H.latent_shape[1:]))


@torch.no_grad()
def decode_in_tiles(ae: Any, ids: torch.Tensor, tile: int, precision: Precision) -> torch.Tensor:
    """Decode a canvas of codes (h, w) of any size to its picture, uint8 (C, H, W) on the CPU. tile: the side of the
    tiles in latents; 0: no tiles."""

    def decode(part: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            return ae.decode(part.reshape(1, -1), *part.shape)[0]

    return to_uint8(decode_tiled(decode, ids, tile or max(ids.shape)))


def reconstruct_batch(x: torch.Tensor, H: Any, models: Any) -> torch.Tensor:
    """Encode images in float32, as for stage 2, and decode the codes, as of samples: uint8 (B, C, H, W) -> uint8
    (B, C, H, W). models: experiments.common.models.Models."""
    ae, parts = models.autoencoder.model, x.to(models.device).split(encoded_at_once(H))
    return torch.cat([decode_batch(ae, encode_batch(ae, to_float(part)), H, models.precision) for part in parts])


def decoded_batches(id_batches: Iterable[torch.Tensor], H: Any, models: Any) -> Iterator[torch.Tensor]:
    """Decode batches of ids (b, L) to batches of images, uint8 (b, C, H, W) on the device."""
    for ids in id_batches:
        yield decode_batch(models.autoencoder.model, ids.to(models.device), H, models.precision)
