"""Draw samples: sheets of 5 x 5, or single images."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.flags import ModelsConfig
from hparams import get_hparams
from hparams.config import opt

SHEET = 25


@dataclass
class SampleConfig:
    """samples"""

    n_sheets: int = opt(100, "sheets of 25 samples", min=1)
    n_samples: int = opt(None, "draw this many single images instead of sheets", min=1)
    first_sample: int = opt(0, "number of the first sample: a sample is a function of --seed and its number", min=0)


EXAMPLES = """example:
  python experiments/get_samples.py --sampler absorbing --dataset churches --log_dir samples_churches \\
      --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 \\
      --n_sheets 1 --temp 0.9
"""
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams("sampler", "Draw samples.", extra=(SampleConfig, ModelsConfig), epilog=EXAMPLES)

import torch

from experiments.common import decode_batch, load_models, sample_batches
from models.summary import describe_sampler, print_dry_run
from utils.errors import run_main
from utils.images import save_png, sheet
from utils.progress import say


def images_of_samples(H, models, n):
    """Yield n generated images one by one, uint8 (C, H, W), in the order of their numbers."""
    sampler = models.sampler.model
    for ids in sample_batches(sampler, n, H, models.precision, models.device, H.first_sample):
        yield from decode_batch(models.autoencoder.model, ids, H, models.precision).cpu()


def main(H):
    models = load_models(H)
    folder = Path("logs", H.log_dir, "images")
    single = H.n_samples is not None or H.save_individually
    n = H.n_samples if H.n_samples is not None else H.n_sheets * SHEET
    pending = []
    for number, image in enumerate(images_of_samples(H, models, n), start=H.first_sample):
        if single:
            save_png(folder / f"sample_{number}.png", image)
            continue
        pending.append(image)
        if len(pending) == SHEET:
            first = number - SHEET + 1
            save_png(folder / f"samples_{first}-{number}.png", sheet(torch.stack(pending), 5), min_side=256)
            pending = []
    say(f"{n} samples in {folder}")


def dry_run(H):
    from models.samplers import build_sampler

    with torch.device("meta"):
        print_dry_run(H, describe_sampler(H, build_sampler(H)))


if __name__ == "__main__":
    run_main(dry_run if H.dry_run else main, H)
