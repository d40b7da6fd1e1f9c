"""Draw images that are larger than those of training: the sampler sees windows of a larger canvas of codes."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import CanvasConfig, ModelsConfig
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt
from utils.core.errors import UsageError, run_main


@dataclass
class BigConfig:
    """larger images"""

    shape: list[int] = opt(
        None, "rows and columns of the canvas of codes: height first, then width", required=True, min=1
    )
    order: str = opt(
        "raster",
        "order in which cells are filled (random: one order per sample); --sample_order is the same flag",
        choices=["raster", "random"],
    )
    cells_per_step: int = opt(
        1,
        "cells of a sample that are revealed together, unless --sample_schedule, --remask_eta or --sample_order "
        "confidence asks for --sample_steps steps",
        min=1,
    )
    crop: bool = opt(False, "generate a smaller canvas at the size of training, and cut out the picture's middle")
    n_samples: int = opt(4, "pictures to draw", min=1)


EXAMPLES = """--temp is 0.8 here unless it is given; --batch_size: canvases at once.

example:
  python experiments/generate_big_samples.py --sampler absorbing --dataset churches \\
      --log_dir big_samples_churches --ae_load_dir vqgan_churches --ae_load_step 2200000 \\
      --load_dir absorbing_churches --load_step 2000000 --ema --shape 32 16
"""


def given_pace(H):
    """The flag that asks for --sample_steps steps, as in get_samples.py, instead of steps of --cells_per_step cells, or
    None. --sample_steps alone does not: earlier versions ignored it."""
    if "sample_schedule" in H.explicit:
        return "--sample_schedule"
    if "remask_eta" in H.explicit and H.remask_eta:
        return "--remask_eta"
    return "--sample_order confidence" if H.sample_order == "confidence" else None


def settle(H):
    """Set the default temperature of this script and its order, and check the shape."""
    if "temp" not in H.explicit:
        H.temp = 0.8
    if "sample_order" in H.explicit:
        if "order" in H.explicit and H.order != H.sample_order:
            raise UsageError(f"--order {H.order} contradicts --sample_order {H.sample_order}: leave one of them out")
        H.order = H.sample_order
    H.sample_order, H.sample_type = H.order, "diffusion"
    if given_pace(H) and "cells_per_step" in H.explicit:
        raise UsageError(
            f"--cells_per_step {H.cells_per_step} contradicts {given_pace(H)}, with which a canvas takes the steps of "
            "--sample_steps: leave one of them out"
        )
    shape, (h, w) = " ".join(map(str, H.shape)), H.latent_shape[1:]
    if len(H.shape) != 2:
        raise UsageError(f"--shape {shape} must be two numbers, rows (height) and then columns (width)")
    if not H.crop and (H.shape[0] < h or H.shape[1] < w):
        raise UsageError(
            f"--shape {shape} is smaller than the training canvas, {h} rows and {w} columns: --crop cuts it out of that"
        )


COMMAND_LINE = dict(
    family="sampler",
    description="Draw images larger than those of training.",
    epilog=EXAMPLES,
    extra=(BigConfig, CanvasConfig, ModelsConfig),
    reads=[name for name in OF_SAMPLING if name not in ("sample_type", "mask_schedule")],
    settle=settle,
    reads_images=False,
)
if __name__ == "__main__":  # before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import torch

from experiments.common.codes import decode_in_tiles
from experiments.common.models import dry_run_of_sampler, load_models
from experiments.common.results import Report
from models.canvas import complete_canvas, draws_per_canvas, sample_canvas
from models.samplers.orders.halton import halton_ranks
from utils.core import distributed
from utils.core.progress import say, track
from utils.core.seed import derive_seed, sample_uniforms


def draw_canvases(H, models):
    """Yield this process's share of n_samples canvases of codes, in batches (b, h, w) int64. No canvas is smaller than
    in training."""
    draw = draw_in_steps if given_pace(H) else draw_cell_by_cell
    shape = tuple(map(max, H.shape, H.latent_shape[1:]))
    for numbers, of_all in distributed.turns(0, H.n_samples, H.batch_size):
        what = f"canvases {numbers[0]} to {numbers[0] + of_all - 1}"  # the main process has the first of each turn
        with models.precision.autocast():
            ids = draw(H, models, numbers, shape, partial(track, description=what, unit="step"))
        yield ids


def draw_cell_by_cell(H, models, numbers, shape, progress):
    """Draw canvases with some numbers in steps of --cells_per_step cells."""
    u = sample_uniforms(H.seed, numbers, shape, models.device)
    order_u = sample_uniforms(derive_seed("order", H.seed), numbers, shape, models.device)
    order = dict(raster=None, random=order_u, halton=halton_ranks(order_u.flatten(1), shape).view_as(u))[H.order]
    return sample_canvas(
        models.sampler.model,
        u,
        H.latent_shape[1:],
        H.temp,
        H.window_batch,
        progress,
        order,
        H.cells_per_step,
        H.temp_end,
        H.top_k,
        H.top_p,
    )


def draw_in_steps(H, models, numbers, shape, progress):
    """Draw canvases with some numbers in --sample_steps steps, as get_samples.py draws."""
    sampler = models.sampler.model
    u = sample_uniforms(H.seed, numbers, draws_per_canvas(sampler, shape), models.device)
    unknown = torch.full((len(numbers), *shape), sampler.mask_id, device=models.device)
    return complete_canvas(sampler, unknown, u, H.latent_shape[1:], H.temp, H.window_batch, progress)


def decode_picture(H, models, ids):
    """A canvas of codes (h, w) -> its picture in the requested shape, uint8 (C, height, width) on the CPU."""
    picture = decode_in_tiles(models.autoencoder.model, ids, H.decode_tile, models.precision)
    height, width = (side * H.img_size // H.latent_shape[1] for side in H.shape)
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return picture[:, top : top + height, left : left + width]


def main(H):
    if H.sampler == "absorbing" and "sample_steps" in H.explicit and not given_pace(H):
        say("note: --sample_steps has no effect without --sample_schedule, --remask_eta or --sample_order confidence")
    models = load_models(H)
    if models.sampler.model.needs_raster_order and (H.order != "raster" or H.cells_per_step > 1):
        raise UsageError("this sampler needs raster order, one cell a step (--order raster --cells_per_step 1)")
    windows = []  # the windows of each network pass
    models.sampler.model.net.register_forward_pre_hook(lambda net, args: windows.append(len(args[0])))
    start = time.monotonic()
    with Report(H, models.device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        share = ([decode_picture(H, models, canvas) for canvas in ids] for ids in draw_canvases(H, models))
        number = 0
        for pictures in distributed.in_order(share):
            for picture in pictures:
                report.picture(f"big_{H.shape[0]}x{H.shape[1]}_{number}", picture)
                number += 1
        passes, windows = distributed.all_reduce_sum(torch.tensor([len(windows), sum(windows)])).tolist()
        report.values(
            "larger images",
            {
                "shape": f"{H.shape[0]} x {H.shape[1]}",
                "pictures": H.n_samples,
                "seconds": time.monotonic() - start,
                "network passes": passes,
                "windows": windows,
            },
        )


if __name__ == "__main__":
    run_main(dry_run_of_sampler if H.dry_run else main, H)
