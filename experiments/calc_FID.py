"""FID (Heusel et al. 2017) of samples against the training images, with KID and inception score."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import AgainstConfig, FeaturesConfig, MetricFlags, ModelsConfig
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt
from utils.core.errors import UsageError, UserError, run_main
from utils.evaluation.metrics import EXTRACTORS, METRICS


@dataclass
class FIDConfig(MetricFlags):
    """FID"""

    n_samples: int = opt(None, "samples to compare with the training images; the paper: 50000", required=True, min=2)
    latents_path: str = opt(
        None,
        "file of codes to decode instead of sampling: a tensor (N, codes), or a cache under latents/",
        metavar="PATH",
        replaces=(*OF_SAMPLING, "seed"),
    )
    save_images: bool = opt(False, "write the samples that were measured to logs/<log_dir>/samples, one PNG each")
    save_latents: bool = opt(False, "write their codes to logs/<log_dir>/latents.pt, for --latents_path")


EXAMPLES = """example:
  python experiments/calc_FID.py --sampler absorbing --dataset churches --log_dir FID --ae_load_dir vqgan_churches \\
      --ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 --ema --n_samples 50000 --temp 0.9 --kid
"""


def settle(H):
    """Refuse an inception score of another network."""
    if H.isc and H.extractor != EXTRACTORS[0]:
        raise UsageError(f"--isc contradicts --extractor {H.extractor}: the inception score is Inception's")


COMMAND_LINE = dict(
    family="sampler",
    description="FID of samples against the training images.",
    epilog=EXAMPLES,
    extra=(FIDConfig, FeaturesConfig, AgainstConfig, ModelsConfig),
    reads=OF_SAMPLING,
    settle=settle,
)
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams(**COMMAND_LINE)

from experiments.common import measure
from experiments.common.images import load_images
from experiments.common.measure import Samples
from experiments.common.models import dry_run_on_images, load_models
from experiments.common.results import Report
from utils.core.device import pick_device


def main(H):
    device = pick_device(H.device)
    names = ["fid", *(name for name, metric in METRICS.items() if metric.help and getattr(H, name))]
    extractors = measure.load_extractors(H, names, device)  # first, because everything else needs them
    images = load_images(H, "train")
    if len(images) < 2:
        raise UserError(f"{H.data_entry['origin']}: the FID needs two training images or more, not {len(images)}")
    models = load_models(H, with_sampler=H.latents_path is None)
    with Report(H, device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        samples = Samples(H, models, H.n_samples, H.latents_path)
        if H.save_images:
            samples.on_images = measure.saving_images(report.folder / "samples")
        values = measure.compare(H, names, extractors, measure.reference(H, images, models), samples)
        ids = samples.all_ids() if H.save_latents else None
        if ids is not None:
            measure.write_latents(report.folder / "latents.pt", ids, models.autoencoder)
        report.compared(values, features=measure.identity_of(extractors))


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else main, H)
