"""Draw samples: sheets of 5 x 5, or single images."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import ModelsConfig, check_show_steps
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt
from utils.core.errors import run_main

SHEET = 25


@dataclass
class SampleConfig:
    """samples"""

    n_sheets: int = opt(100, "sheets of 25 samples", min=1)
    n_samples: int = opt(None, "draw this many single images instead of sheets", min=1, replaces=("n_sheets",))
    first_sample: int = opt(
        0, "number of the first sample; --seed and the number determine a sample, not --batch_size", min=0
    )
    show_steps: bool = opt(False, "show how the first sheet's samples are drawn, in 8 frames: a strip and a GIF")
    save_latents: bool = opt(False, "write the codes to logs/<log_dir>/latents.pt, for calc_FID.py --latents_path")


EXAMPLES = """examples:
  python experiments/get_samples.py --sampler absorbing --dataset churches --log_dir samples_churches \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 \\
      --n_sheets 1 --temp 0.9 --seed 1
  python experiments/get_samples.py ... --n_samples 8 --first_sample 100 --sample_steps 50
  python experiments/get_samples.py ... --n_sheets 1 --show_steps
"""


COMMAND_LINE = dict(
    family="sampler",
    description="Draw samples.",
    epilog=EXAMPLES,
    extra=(SampleConfig, ModelsConfig),
    reads=(*OF_SAMPLING, "save_individually"),
    settle=check_show_steps,
    reads_images=False,
)
if __name__ == "__main__":  # before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import torch

from experiments.common.codes import decode_batch
from experiments.common.measure import write_latents
from experiments.common.models import dry_run_of_sampler, load_models
from experiments.common.pictures import show_denoising
from experiments.common.results import Report
from experiments.common.sampling import sample_batches
from utils.core import distributed
from utils.core.seed import sample_uniforms
from utils.display.images import sheet
from utils.evaluation.features import regroup


def drawn_images(H, models, n, first, keep):
    """Samples in order, uint8 (b, C, H, W) on the CPU. keep(ids) is called with the codes of each batch."""

    def share():
        for ids in sample_batches(models.sampler.model, n, H, models.precision, models.device, first):
            yield ids.cpu(), decode_batch(models.autoencoder.model, ids, H, models.precision).cpu()

    for ids, images in distributed.in_order(share()):
        keep(ids)
        yield images


def main(H):
    models = load_models(H)
    single = H.n_samples is not None or H.save_individually
    n = H.n_samples if H.n_samples is not None else H.n_sheets * SHEET
    ids = []
    start = time.monotonic()
    with Report(H, models.device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        number = H.first_sample
        for group in regroup(drawn_images(H, models, n, number, ids.append), 1 if single else SHEET):
            if single:
                report.picture(f"sample_{number}", group[0], min_side=1, shown="sample")
            else:
                report.picture(f"samples_{number}-{number + SHEET - 1}", sheet(group, 5), shown="samples")
            number += len(group)
        if H.show_steps and distributed.is_main():
            first, shape = H.first_sample, models.sampler.model.draws_per_sample()
            u = sample_uniforms(H.seed, range(first, first + SHEET), shape, models.device)[:n]
            show_denoising(report, H, models, torch.cat(ids)[:SHEET], u, f"denoising_{first}")
        if H.save_latents and distributed.is_main():
            write_latents(report.folder / "latents.pt", torch.cat(ids), models.autoencoder)
        seconds = time.monotonic() - start
        report.values(
            f"samples in {report.folder / 'images'}", dict(samples=n, first_sample=H.first_sample, seconds=seconds)
        )


if __name__ == "__main__":
    run_main(dry_run_of_sampler if H.dry_run else main, H)
