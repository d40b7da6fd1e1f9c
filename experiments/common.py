"""What the scripts share: codes of images, samples of codes, pictures of codes; all of it batched."""

from dataclasses import dataclass

import torch

from hparams.sources import require_folder
from models.load import Loaded, load_autoencoder, load_sampler
from models.samplers import build_sampler
from models.summary import describe_sampler, print_dry_run
from utils import codes, compilation, distributed
from utils.amp import Precision
from utils.checkpoint import checkpoints_of
from utils.data import one_pass, to_float
from utils.errors import UserError
from utils.images import to_uint8
from utils.progress import Progress
from utils.run import pick_device
from utils.seed import sample_uniforms

# A batch that is encoded has at most so many images, and so many pixels (16 images of 256 x 256, some 2 GiB with the
# paper's autoencoder in float32), whatever the --batch_size of stage 2, which is meant for codes.
ENCODED_IMAGES, ENCODED_PIXELS = 64, 1 << 20


@dataclass
class Models:
    """What the experiments work with: device, precision, autoencoder and sampler (None where none is needed)."""

    device: torch.device
    precision: Precision
    autoencoder: Loaded
    sampler: Loaded


def load_models(H, with_sampler=True):
    """The models of a command line that names --ae_load_dir and (with_sampler) --load_dir."""
    device = pick_device(H.device)
    if with_sampler and not H.load_step:
        raise UserError("--load_dir and --load_step must name a trained sampler")
    autoencoder = load_autoencoder(H, device)
    sampler = load_sampler(H, device) if with_sampler else None
    if with_sampler and not H.allow_other_ae:
        check_pair(H, autoencoder)
    return Models(device, Precision(H.amp, H.amp_dtype, device), autoencoder, sampler)


def require_size(H):
    """Where no model is loaded --ae_load_dir says only how large the images are: refuse one that does not exist,
    unless the command line says it."""
    if "img_size" not in H.explicit:
        require_folder("ae_load_dir", H.ae_load_dir)


def check_autoencoder(run, autoencoder):
    """A run goes on only with the autoencoder that it has learned with, which is noted in its manifests."""
    known = (run.manifest or {}).get("autoencoder")
    if known and known["hash"] != autoencoder.hash:
        raise UserError(
            f"{run.folder} was trained with {known['path']}, which is not {autoencoder.path}: "
            "give that autoencoder, or another --log_dir"
        )
    run.about["autoencoder"] = dict(path=autoencoder.path, hash=autoencoder.hash)


def check_pair(H, autoencoder):
    """Refuse a sampler that was trained on another autoencoder's codes (where the run recorded it)."""
    store = checkpoints_of(H.load_dir)
    if not store.manifest_path(H.load_step).is_file():
        return  # a published checkpoint
    known = store.manifest(H.load_step).get("autoencoder")
    if known and known.get("hash") != autoencoder.hash:
        raise UserError(
            f"the sampler logs/{H.load_dir} (step {H.load_step}) was trained on the codes of "
            f"{known.get('path')}, which is not {autoencoder.path}: give that autoencoder (or --allow_other_ae)"
        )


def cached_codes(H, images, split, autoencoder, device, say, flip=False):
    """The ids of an ImageSet, (N, L) int64 on the CPU, from the cache under latents/ or computed now.

    autoencoder: models.load.Loaded. flip: of the mirror images. They are encoded in float32, also with --amp: in bf16
    1% of the codes would be others. (H.codes_precision: a run of an earlier version keeps the format it began with.)
    """
    precision = Precision(H.codes_precision == "amp", H.amp_dtype, device)
    header = dict(
        format=codes.FORMAT, dataset=H.dataset, split=split, flip=flip, autoencoder=autoencoder.hash,
        latent_shape=H.latent_shape, images=distributed.from_main(images.identity), precision=precision.describe(),
    )  # fmt: skip

    what = f"encoding {split} images" + (" (mirrored)" if flip else "")
    progress = Progress(len(images), what, "img", lazy=True)
    batch_size = min(ENCODED_IMAGES, max(1, ENCODED_PIXELS // H.img_size**2))

    def encode_share(positions):
        for x, _ in one_pass(images, batch_size, H.num_workers, flip, positions, shared=True):
            images.check_broken(say)
            if not len(x):
                yield None
                continue
            yield encode_batch(autoencoder.model, to_float(x.to(device)), precision).to(torch.int16).cpu()

    def encode(positions):
        progress.skip_to(positions.start)
        parts = [torch.empty(0, H.block_size, dtype=torch.int16)]  # of some thousand images all may be broken
        for ids in distributed.in_order(encode_share(positions)):
            parts.append(ids)
            progress.update(len(ids))
        images.check_all_broken(say)
        return dict(ids=torch.cat(parts), left_out=images.left_out(positions))

    with progress:
        return codes.cached(header, images, H.codebook_size, batch_size, encode, say).long()


@torch.no_grad()
def encode_batch(ae, x, precision=None):
    """Floats in [0, 1], (B, C, H, W) -> ids (B, L) int64. Without a Precision in float32, not a GPU's TF32: in three
    digits other codes are nearest."""
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


def sample_batches(sampler, n, H, precision, device, first=0):
    """Yield ids (b, L) for samples first .. first+n-1, each a function of (--seed, its number) alone: this process's
    share of them, as utils.distributed.in_order puts together."""
    own = list(distributed.turns(first, n, H.batch_size))
    numbers = [i for some, _ in own for i in some]

    def draw(rows):
        return sample_uniforms(H.seed, [numbers[i] for i in rows], sampler.draws_per_sample(), device)

    compilation.compile_model(sampler, H.compile, device, n >= compilation.MANY_SAMPLES)
    with Progress(n, "sampling", "img", workers=distributed.world_size()) as progress:
        batches = sampler.sample_many(draw, len(numbers), len(own[0][0]) if own else 1, H.temp, progress)
        for _, of_all in own:
            with precision.autocast():  # not while others work on what is yielded
                ids = next(batches)
            yield ids
            progress.update(of_all)


def dry_run_of_sampler(H):
    """--dry_run of a script that uses a sampler."""
    with torch.device("meta"):
        print_dry_run(H, describe_sampler(H, build_sampler(H)))
