"""Measures FID, L1, PSNR and LPIPS of a VQGAN's reconstructions, and the use of the codebook."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import FeaturesConfig
from hparams import get_hparams
from hparams.config import opt
from utils.core.errors import UsageError


@dataclass
class ReconstructionConfig:
    """reconstructions"""

    ae_load_dir: str = opt(None, "folder under logs/ that holds the VQGAN (or --load_dir)", metavar="NAME")
    ae_load_step: int = opt(None, "step of the VQGAN to load (default: the newest complete one)", min=0)
    n_samples: int = opt(None, "images, spread evenly over the split (default: all)", min=2)
    split: str = opt("train", "images to reconstruct", choices=["train", "val"])
    save_images: bool = opt(False, "write the reconstructions that were measured to logs/<log_dir>/reconstructions")


EXAMPLES = """examples:
  python experiments/calc_VQGAN_FID.py --dataset churches --log_dir VQGAN_FID_log \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --n_samples 50000
  python experiments/calc_VQGAN_FID.py ... --split val

The FID compares images with their own reconstructions.
"""


def choose_vqgan(H):
    """Accept --load_dir and --load_step instead of --ae_load_dir and --ae_load_step."""
    if H.ae_load_dir is None and H.load_step:
        H.ae_load_dir, H.ae_load_step = H.load_dir, H.load_step
    if H.ae_load_dir is None:
        raise UsageError("give the VQGAN with --ae_load_dir")


COMMAND_LINE = dict(
    family="vqgan",
    description="Measure FID, L1, PSNR and LPIPS of a VQGAN's reconstructions.",
    epilog=EXAMPLES,
    extra=(ReconstructionConfig, FeaturesConfig),
    reads=("perceptual_weights",),
    settle=choose_vqgan,
)
if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import math

import torch

from experiments.common.codes import encode_batch
from experiments.common.efficientnet import load_distance
from experiments.common.images import load_images, note_images
from experiments.common.measure import Images, each_image, load_extractor, saving_images
from experiments.common.models import load_models
from experiments.common.pictures import CodeMeans
from experiments.common.results import Report
from experiments.common.weights import has_perceptual, load_lpips, note_missing_weights
from models.build import build_autoencoder
from models.quantizers import usage_figures
from models.summary import describe_stage_1, print_dry_run
from utils.core import distributed
from utils.core.checkpoint import checkpoints_of
from utils.core.device import pick_device
from utils.core.errors import UserError, run_main
from utils.core.progress import say
from utils.data.pixels import to_float, to_uint8
from utils.display.grids import TRIPLES_CAPTION
from utils.display.images import TRIPLES, sheet, triples
from utils.evaluation.features import collect
from utils.evaluation.metrics import EXTRACTORS, fid
from utils.evaluation.neighbours import lpips_input
from utils.evaluation.weight_files import WEIGHT_FILES
from utils.training.meters import CodeUsage, Meters

N_SHOWN = 16
LEAST_MSE = 1e-10  # this limits the PSNR to 100 dB, because a perfect reconstruction has an infinite PSNR


class Reconstructor:
    """Reconstructs batches and sums their errors. seen: the number of images so far."""

    def __init__(self, H, models, perceptual):
        """Begin with zero sums. perceptual: {name: distance (x, y) -> (B, 1, 1, 1)} for images in [0, 1]."""
        self.models, self.perceptual, self.seen = models, perceptual, 0
        self.latent_shape = H.latent_shape[1:]
        self.meters, self.usage = Meters(models.device), CodeUsage(H.codebook_size, models.device)
        self.codes = CodeMeans(H.codebook_size, H.n_channels, H.img_size // self.latent_shape[0], models.device)

    @torch.no_grad()
    def __call__(self, x):
        """Reconstruct uint8 (B, C, H, W) -> uint8 on the device. All errors are computed from the uint8 pixels."""
        models = self.models
        x = x.to(models.device)
        a = to_float(x)
        ids = encode_batch(models.autoencoder.model, a, models.precision)
        with models.precision.autocast():
            x_hat = to_uint8(models.autoencoder.model.decode(ids, *self.latent_shape))
        self.usage.add(ids)
        self.codes.add(a, ids)
        b = to_float(x_hat)
        mse = (a - b).square().flatten(1).mean(1).clamp(min=LEAST_MSE)
        errors = dict(l1=(a - b).abs().mean(), psnr=(-10 * mse.log10()).mean())
        for name, distance in self.perceptual.items():
            errors[name] = distance(a, b).mean()
        self.meters.add(errors, len(x))
        self.seen += len(x)
        return x_hat


def features_of_reconstructions(H, images, reconstruct, extractor, save):
    """Return (FeatureSet of the reconstructions, picture). The picture shows the first images, their reconstructions
    and the differences. Processes other than the main process get (None, None). save: a function that gets each batch
    of reconstructions, or None."""
    shown = []

    def work(x):
        show = reconstruct.seen < N_SHOWN
        x_hat = reconstruct(x)
        return *extractor(x_hat), x if show else None, x_hat.cpu() if show or save else None

    def pairs():
        for features, logits, x, x_hat in each_image(images, H, work, "reconstructing"):
            if save:
                save(x_hat)
            if x is not None:
                shown.append((x, x_hat))
            yield features, logits

    found = collect(pairs(), "reconstructions")
    if found is None:
        return None, None
    left, right = (torch.cat(side)[:N_SHOWN] for side in zip(*shown, strict=True))
    return found, sheet(triples(left, right), **TRIPLES)


class NoFeatures:
    """Replaces Inception if its weights are missing. This class counts images and gives no features."""

    identity = None

    def __call__(self, x):
        return torch.zeros(len(x), 1), torch.zeros(len(x), 1)


def find_extractor(H, device):
    """Load the network of --extractor. If the weights of Inception are missing, print a note and return NoFeatures."""
    try:
        return load_extractor(H, device)
    except UserError as error:
        if H.extractor != EXTRACTORS[0] or H.feature_weights or WEIGHT_FILES["inception"].exists:
            raise
        say(f"note: rFID is left out: {error}")
        return NoFeatures()


def find_perceptual(H, autoencoder, device):
    """Return {name: distance} for Reconstructor. If --extractor selects EfficientNet-Lite0, the distance uses this
    network. Otherwise the distance is LPIPS with VGG16, whose weights may be in the checkpoint. If these weights are
    missing, print a note and return {}."""
    if H.extractor != EXTRACTORS[0]:
        return {f"perceptual_{H.extractor}": load_distance().to(device)}
    try:
        otherwise = "; or measure with another network, which needs no download: --extractor efficientnet_lite0"
        lpips = load_lpips("vgg", H.perceptual_weights, autoencoder.path, otherwise).to(device)
        return dict(lpips=lambda x, y: lpips(lpips_input(x), lpips_input(y)))
    except UserError as error:
        if H.perceptual_weights:
            raise
        say(f"note: LPIPS is left out: {error}")
        return {}


def main(H):
    device = pick_device(H.device)
    extractor = find_extractor(H, device)
    images = load_images(H, H.split)
    if len(images) < 2:
        raise UserError(f"{H.data_entry['origin']}: the FID needs two images or more in '{H.split}', not {len(images)}")
    if H.n_samples is not None and H.n_samples < len(images):
        images = images.evenly(H.n_samples)
    models = load_models(H, with_sampler=False)
    reconstruct = Reconstructor(H, models, find_perceptual(H, models.autoencoder, device))
    with Report(H, device, autoencoder=models.autoencoder) as report:
        save = saving_images(report.folder / "reconstructions") if H.save_images else None
        fake, picture = features_of_reconstructions(H, images, reconstruct, extractor, save)
        real = Images(H, images).features(extractor, keep=False) if extractor.identity else None
        errors, usage = reconstruct.meters.pop_means(), usage_figures(reconstruct.usage.pop_counts())
        reconstruct.codes.share()
        if not distributed.is_main():
            return
        values = {f"r{name}": value for name, value in fid(real, fake, H).items()} if real else {}
        values.update(**errors, **usage, codebook_size=H.codebook_size, images=fake.count)
        path = report.picture("reconstructions", picture, TRIPLES_CAPTION)
        report.picture("codebook", reconstruct.codes.sheet(), reconstruct.codes.caption(), 512)
        report.values(
            f"reconstructions of {fake.count} images ('{H.split}') of '{H.dataset}'; {path}",
            values,
            features=extractor.identity,
            bits_per_code=math.log2(H.codebook_size),
        )


def dry_run(H):
    with torch.device("meta"):
        print_dry_run(H, describe_stage_1(H, build_autoencoder(H)))
    note_images(H)
    if H.extractor != EXTRACTORS[0]:
        return
    note_missing_weights(H, "inception")
    checkpoints = [checkpoints_of(H.ae_load_dir).path(name, H.ae_load_step) for name in ("vqgan_ema", "vqgan")]
    if not any(path.is_file() and has_perceptual(path) for path in checkpoints):
        note_missing_weights(H, "vgg")


if __name__ == "__main__":
    run_main(dry_run if H.dry_run else main, H)
