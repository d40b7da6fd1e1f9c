"""FID (Heusel et al. 2017) of samples against the training images, with KID and inception score."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import FeaturesConfig, ModelsConfig
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt


@dataclass
class FIDConfig:
    """FID"""

    n_samples: int = opt(None, "samples to compare with the training images; the paper: 50000", required=True, min=2)
    latents_path: str = opt(
        None,
        "file of codes to decode instead of sampling: a tensor (N, codes), or a cache under latents/",
        metavar="PATH",
        replaces=(*OF_SAMPLING, "seed"),
    )
    kid: bool = opt(False, "the kernel inception distance (Binkowski et al. 2018) too")
    isc: bool = opt(False, "the inception score (Salimans et al. 2016) too, of 10 parts of the samples")
    save_images: bool = opt(False, "write the samples that were measured to logs/<log_dir>/samples, one PNG each")
    save_latents: bool = opt(False, "write their codes to logs/<log_dir>/latents.pt, for --latents_path")


EXAMPLES = """examples:
  python experiments/calc_FID.py --sampler absorbing --dataset churches --log_dir FID_log \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 \\
      --ema --n_samples 50000 --temp 0.9
  python experiments/calc_FID.py ... --n_samples 50000 --kid --isc

Features of the training images are cached under features/, and so are those of the samples: the same command
with --kid, or calc_PRDC.py for the same samples, does not sample again.
"""
COMMAND_LINE = dict(
    family="sampler",
    description="FID of samples against the training images.",
    epilog=EXAMPLES,
    extra=(FIDConfig, FeaturesConfig, ModelsConfig),
    reads=OF_SAMPLING,
)
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams(**COMMAND_LINE)

import torch

from experiments.common.images import load_images
from experiments.common.measure import Samples, compute_fid, image_features, new_folder, saving_images, write_latents
from experiments.common.models import dry_run_on_images, load_models
from experiments.common.results import Report
from utils.core import distributed
from utils.core.device import pick_device
from utils.core.errors import UserError, run_main
from utils.core.progress import say
from utils.evaluation.features import Inception

KID_SUBSET = 1000
ISC_SAMPLES = 5000
KID_REAL = 100_000  # if there are more training images, the KID uses evenly spaced ones: it draws subsets anyway


def compute_kid(real_features, fake_features):
    """Mean and standard deviation over subsets of the KID, by torch-fidelity. Features (N, 2048).

    The samples are its first input, as on its command line: the subsets that it draws depend on the order.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET, len(real_features), len(fake_features))
    if size < KID_SUBSET:
        say(f"note: KID over subsets of {size} images, not {KID_SUBSET}: there are no more")
    result = kid_features_to_metric(fake_features, real_features, kid_subset_size=size, verbose=False)
    return dict(kid=result["kernel_inception_distance_mean"], kid_std=result["kernel_inception_distance_std"])


def compute_isc(logits):
    """Mean and standard deviation over splits of the inception score, by torch-fidelity. logits (N, 1008)."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < ISC_SAMPLES:
        say(f"note: the inception score of {len(logits)} samples says little: it is usually taken of 50000")
    result = isc_features_to_metric(logits, splits=min(10, len(logits)))
    return dict(isc=result["inception_score_mean"], isc_std=result["inception_score_std"])


def main(H):
    device = pick_device(H.device)
    extractor = Inception(H.feature_weights, device)  # first, because everything else needs it
    images = load_images(H, "train")
    if len(images) < 2:
        raise UserError(f"{H.data_entry['origin']}: the FID needs two training images or more, not {len(images)}")
    models = load_models(H, with_sampler=H.latents_path is None)
    with Report(H, device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        samples = Samples(H, models, H.n_samples, H.latents_path)
        few = len(images) <= KID_REAL
        # First, because damaged images are found here, and samples may take hours.
        real = image_features(H, extractor, images, keep=H.kid and few)
        ids = []
        fake = samples.features(
            extractor,
            on_ids=(lambda batch: ids.append(batch.cpu())) if H.save_latents else None,
            on_images=saving_images(new_folder(report.folder / "samples")) if H.save_images else None,
        )
        for_kid = image_features(H, extractor, images.evenly(KID_REAL), keep=True) if H.kid and not few else real
        if not distributed.is_main():
            return
        if H.save_latents:
            write_latents(report.folder / "latents.pt", torch.cat(ids), models.autoencoder)
        values = dict(fid=compute_fid(real, fake))
        if H.kid:
            values.update(compute_kid(for_kid.features, fake.features))
        if H.isc:
            values.update(compute_isc(fake.logits))
        report.values(
            f"{fake.count} samples against {real.count} training images of '{H.dataset}'",
            dict(values, samples=fake.count, training_images=real.count),
            features=extractor.identity,
        )


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else main, H)
