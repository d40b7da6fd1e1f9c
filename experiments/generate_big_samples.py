"""Draw images larger than those of training: one canvas of codes, read through sliding windows."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.flags import ModelsConfig
from hparams import get_hparams
from hparams.config import opt
from utils.errors import UsageError, run_main


@dataclass
class BigConfig:
    """larger images"""

    shape: list[int] = opt(None, "height and width of the canvas in latents", required=True, min=1)
    order: str = opt("raster", "in what order cells are filled (random: each sample in its own)",
                     choices=["raster", "random"])  # fmt: skip
    cells_per_step: int = opt(1, "cells of a sample that are revealed together", min=1)
    crop: bool = opt(False, "generate a smaller canvas at the size of training, and cut out the picture's middle")
    n_samples: int = opt(4, "pictures to draw", min=1)
    window_batch: int = opt(64, "windows in one network pass", min=1)
    decode_tile: int = opt(32, "side in latents of the tiles in which larger canvases are decoded; 0: at once", min=0)


EXAMPLES = """--temp is 0.8 here unless it is given; --batch_size: canvases at once.

example:
  python experiments/generate_big_samples.py --sampler absorbing --dataset churches \\
      --log_dir big_samples_churches --ae_load_dir vqgan_churches --ae_load_step 2200000 \\
      --load_dir absorbing_churches --load_step 2000000 --ema --shape 32 16
"""


def settle(H):
    """What is particular to this script in H: the temperature, and the shape's limits."""
    if "temp" not in H.explicit:
        H.temp = 0.8
    shape, (h, w) = " ".join(map(str, H.shape)), H.latent_shape[1:]
    if len(H.shape) != 2:
        raise UsageError(f"--shape {shape} must be two numbers, height and width")
    if not H.crop and (H.shape[0] < h or H.shape[1] < w):
        raise UsageError(f"--shape {shape} is smaller than the training canvas, {h} {w}: --crop cuts it out of that")


COMMAND_LINE = dict(
    family="sampler", description="Draw images larger than those of training.", epilog=EXAMPLES,
    extra=(BigConfig, ModelsConfig), reads=("temp",), settle=settle,
)  # fmt: skip
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams(**COMMAND_LINE)

import torch

from experiments.common import dry_run_of_sampler, load_models
from experiments.report import Report
from models.canvas import sample_canvas
from models.tiles import decode_tiled
from utils.images import to_uint8
from utils.progress import track
from utils.seed import derive_seed, sample_uniforms


def canvases(H, models):
    """Yield n_samples canvases of codes one by one, (h, w) int64, none smaller than in training."""
    window = H.latent_shape[1:]
    shape = tuple(map(max, H.shape, window))
    for first in range(0, H.n_samples, H.batch_size):
        numbers = range(first, min(first + H.batch_size, H.n_samples))
        u = sample_uniforms(H.seed, numbers, shape, models.device)
        order_u = sample_uniforms(derive_seed("order", H.seed), numbers, shape, models.device)
        order = order_u if H.order == "random" else None
        progress = partial(track, description=f"canvases {first} to {numbers[-1]}", unit="step")
        with models.precision.autocast():
            ids = sample_canvas(models.sampler.model, u, window, H.temp, H.window_batch, progress, order,
                                H.cells_per_step)  # fmt: skip
        yield from ids


@torch.no_grad()
def decode_canvas(H, models, ids):
    """A canvas of codes (h, w) -> its picture in the shape asked for, uint8 (C, height, width) on the CPU."""

    def decode(part):
        with models.precision.autocast():
            return models.autoencoder.model.decode(part.reshape(1, -1), *part.shape)[0]

    picture = to_uint8(decode_tiled(decode, ids, H.decode_tile or max(ids.shape)))
    height, width = (side * H.img_size // H.latent_shape[1] for side in H.shape)
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return picture[:, top : top + height, left : left + width]


def main(H):
    models = load_models(H)
    windows = []  # in each network pass
    next(models.sampler.model.children()).register_forward_pre_hook(lambda net, args: windows.append(len(args[0])))
    start = time.monotonic()
    with Report(H, models.device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        for number, ids in enumerate(canvases(H, models)):
            report.picture(f"big_{H.shape[0]}x{H.shape[1]}_{number}", decode_canvas(H, models, ids))
        report.values("larger images", {
            "shape": f"{H.shape[0]} x {H.shape[1]}", "pictures": H.n_samples, "seconds": time.monotonic() - start,
            "network passes": len(windows), "windows": sum(windows),
        })  # fmt: skip


if __name__ == "__main__":
    run_main(dry_run_of_sampler if H.dry_run else main, H)
