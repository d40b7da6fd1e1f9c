"""From images to codes (read from the cache, or computed), and from codes to images."""

import torch

from utils.core import distributed
from utils.core.progress import Progress
from utils.data import codes
from utils.data.batches import one_pass
from utils.data.pixels import to_float, to_uint8
from utils.training.amp import Precision

# The most images and pixels of a batch that is encoded (16 images of 256 x 256: about 2 GiB with the paper's
# autoencoder in float32). It does not depend on the --batch_size of stage 2, which is meant for codes.
ENCODED_IMAGES, ENCODED_PIXELS = 64, 1 << 20


def cached_codes(H, images, split, autoencoder, device, say, flip=False):
    """The ids of an ImageSet, (N, L) int64 on the CPU, from the cache under latents/ or computed now.

    autoencoder: experiments.common.weights.Loaded. flip: encode the mirrored images. Images are encoded in float32,
    also with --amp: in bf16, 1% of the codes would differ. (H.codes_precision: a run of an earlier version keeps the
    number format that it started with.)
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

    what = f"encoding {split} images" + (" (mirrored)" if flip else "")
    progress = Progress(len(images), what, "img", lazy=True)
    stored = codes.ids_type(H.codebook_size)
    batch_size = min(ENCODED_IMAGES, max(1, ENCODED_PIXELS // H.img_size**2))

    def encode_share(positions):
        for x, _ in one_pass(images, batch_size, H.num_workers, flip, positions, shared=True):
            images.check_broken(say)
            if not len(x):
                yield None
                continue
            yield encode_batch(autoencoder.model, to_float(x.to(device)), precision).to(stored).cpu()

    def encode(positions):
        progress.skip_to(positions.start)
        parts = [torch.empty(0, H.block_size, dtype=stored)]  # all images of a part may be broken
        for ids in distributed.in_order(encode_share(positions)):
            parts.append(ids)
            progress.update(len(ids))
        images.check_all_broken(say)
        return dict(ids=torch.cat(parts), left_out=images.left_out(positions))

    with progress:
        return codes.cached(header, images, H.codebook_size, batch_size, encode, say).long()


@torch.no_grad()
def encode_batch(ae, x, precision=None):
    """Floats in [0, 1], (B, C, H, W) -> ids (B, L) int64. Without a Precision it computes in float32, not in a GPU's
    TF32: with only three digits, other codes would be the nearest."""
    precise = torch.autocast(x.device.type, enabled=False)
    with precision.autocast() if precision else precise, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return ae.encode(x)


@torch.no_grad()
def decode_batch(ae, ids, H, precision):
    """ids (B, L) -> uint8 (B, C, H, W)."""
    with precision.autocast():
        return to_uint8(ae.decode(ids, *H.latent_shape[1:]))


def decoded_batches(id_batches, H, models):
    """Batches of ids (b, L) -> batches of images, uint8 (b, C, H, W) on the device."""
    for ids in id_batches:
        yield decode_batch(models.autoencoder.model, ids.to(models.device), H, models.precision)
