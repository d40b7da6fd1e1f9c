"""Finds out how likely the prior finds pictures, and which part of a picture is unlikely."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import ModelsConfig
from hparams import get_hparams
from hparams.config import opt
from utils.core.errors import UserError, run_main


@dataclass
class JudgeConfig:
    """judging"""

    images: list[str] = opt(None, "pictures, or folders of pictures (default: the validation images)", metavar="PATH")
    compare_with: list[str] = opt(None, "other pictures to compare the likelihood with", metavar="PATH")
    passes: int = opt(16, "stratified network passes of each estimate of the likelihood", min=1, max=100_000)
    repeats: int = opt(4, "estimates of each picture, for its standard error", min=2, max=1000)
    subsets: int = opt(
        0, "passes of the surprise map over random subsets of the codes; 0: given all other codes", min=0, max=100_000
    )
    defects: int = opt(0, "also test the map: paste a patch of another picture into this many of --images", min=0)


EXAMPLES = """examples:
  python experiments/judge_images.py --sampler absorbing --dataset churches --log_dir judged_churches \\
      --ae_load_dir vqgan_churches --load_dir absorbing_churches --images ~/pictures --compare_with ~/others
  python experiments/judge_images.py ... --defects 100
"""
COMMAND_LINE = dict(
    family="sampler",
    description="Judge how likely pictures and their parts are.",
    epilog=EXAMPLES,
    extra=(JudgeConfig, ModelsConfig),
)
if __name__ == "__main__":  # before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import csv
import io
import math

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from experiments.common.editing import ENCODED, encode_parts, to_pixels
from experiments.common.images import find_pictures, load_images, read_pictures
from experiments.common.models import dry_run_of_sampler, load_models, note_if_seen
from experiments.common.results import Report
from models.judging import Rows, negative_log_likelihood, surprise
from utils.core import distributed
from utils.core.files import atomic_write
from utils.core.progress import track
from utils.core.seed import StepRandom, derive_seed
from utils.data.batches import one_pass
from utils.data.pixels import to_float
from utils.display.images import enlarge, sheet

SHOWN = 8  # pictures in each row of a sheet
MIN_SHOWN = 96  # pixels: the sheets enlarge smaller pictures to this size
LEAST_CHANGE = 0.1  # the mean difference of a pasted patch from the pixels before, in [0, 1]
BINS = 30  # of the histogram


def encode_all(models, pictures):
    return encode_parts(models, map(to_float, pictures.split(ENCODED)))


def bits_per_code(H, models, ids, what):
    """Estimates of each picture's bound in bits per code: ids (N, L) -> (N, repeats)."""
    with models.precision.autocast():
        nats = negative_log_likelihood(models.sampler.model, ids, H.seed, H.passes, H.repeats, H.batch_size, what)
    return nats / (math.log(2) * ids.shape[1])


def surprise_maps(H, models, ids):
    """Bits of each code, (N, h, w) float32 on the CPU."""
    found, rng = [], StepRandom("surprise", H.seed)
    for part in track(list(ids.split(H.batch_size)), "surprise maps", unit="batch"):
        rows = torch.cat([rng.rand(1, ids.shape[1] + 1) for _ in part])  # of each picture: not of its batch
        with models.precision.autocast():
            found.append(surprise(models.sampler.model, part, Rows(rows), H.subsets).cpu())
    return torch.cat(found).unflatten(1, tuple(H.latent_shape[1:]))


def heat(picture, bits, most):
    """A grey picture with its surprise in red: uint8 (C, H, W), bits (h, w) -> uint8 (3, H, W)."""
    grey = picture.float().mean(0).expand(3, -1, -1)
    weight = to_pixels((bits / most).clamp(0, 1)[None], picture.shape[-1])[0]
    red = torch.tensor([255.0, 0.0, 0.0])[:, None, None]
    return torch.lerp(grey, red.expand_as(grey), 0.8 * weight).round().to(torch.uint8)


def auroc(high, low):
    """The probability that a value of `high` is larger than one of `low`, where equal values count half."""
    return float(mannwhitneyu(np.asarray(high), np.asarray(low)).statistic / (len(high) * len(low)))


def plant(H, pictures, count):
    """Paste a patch of the next picture into each of `count` pictures -> (pictures uint8 (n, C, H, W), patches (n, h,
    w) bool). The patch has a quarter of the rows and columns of cells, and is at a random one of the places at which it
    changes the picture enough; a picture without such a place is left out."""
    h, w = H.latent_shape[1:]
    rows, columns, cell = max(1, h // 4), max(1, w // 4), H.img_size // h
    found, patches, n = [], [], len(pictures)
    for i in range(count):
        picture, other = (pictures[j % n] for j in (i, i + 1 + i // n % max(n - 1, 1)))
        change = (to_float(picture) - to_float(other)).abs().mean(0).unfold(0, rows * cell, cell)
        change = change.unfold(1, columns * cell, cell).mean((2, 3))
        places = (change > LEAST_CHANGE).nonzero().tolist()
        if not places:
            continue
        top, left = places[derive_seed("defect", H.seed, i) % len(places)]
        patch = torch.zeros(h, w, dtype=torch.bool)
        patch[top : top + rows, left : left + columns] = True
        found.append(other.where(to_pixels(patch[None], H.img_size)[0], picture))
        patches.append(patch)
    if not found:
        raise UserError("--defects: the pictures are too similar: no patch of one changes another")
    return torch.stack(found), torch.stack(patches)


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    with atomic_write(path) as f:
        f.write(text.getvalue().encode())


def write_histogram(path, sets):
    """A histogram of {name: values} to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(min(map(min, sets.values())), max(map(max, sets.values())), BINS + 1)
    for name, values in sets.items():
        axes.hist(values, edges, alpha=0.5, density=True, label=name)
    axes.set(xlabel="bits per code", ylabel="density")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    with atomic_write(path) as f:
        f.write(buffer.getvalue())


def main(H):
    models = load_models(H)
    if models.sampler.model.needs_raster_order:
        raise UserError("judging needs an absorbing sampler: another predicts a code only from the codes before it")
    if distributed.world_size() > 1:
        raise UserError("judge_images.py works in one process: start it without torchrun")
    if H.images is None:
        val = load_images(H, "val", hold_out=True)
        note_if_seen(H)
        pictures = torch.cat([x for x, _ in one_pass(val, H.batch_size, H.num_workers)])
        names = [val.name(i) for i in range(len(val)) if not val.broken[i]]
    else:
        names = find_pictures("images", H.images)
        pictures = read_pictures(H, "images", names)
    sets = {"images": (names, pictures)}
    if H.compare_with:
        others = find_pictures("compare_with", H.compare_with)
        sets["compare_with"] = (others, read_pictures(H, "compare_with", others))
    if H.defects:  # an error comes before the work
        spoilt, patches = plant(H, pictures, H.defects)
    with Report(H, models.device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        rows, means = [], {}
        for what, (some, xs) in sets.items():
            bits = bits_per_code(H, models, encode_all(models, xs), what)
            means[what], errors = bits.mean(1).tolist(), (bits.std(1) / H.repeats**0.5).tolist()
            rows += [(what, *row) for row in zip(some, means[what], errors, strict=True)]
        write_csv(report.folder / "likelihood.csv", ("set", "picture", "bits_per_code", "standard_error"), rows)
        values = {f"bits per code, {what}": float(np.mean(found)) for what, found in means.items()}
        if H.compare_with:
            values["AUROC"] = auroc(means["compare_with"], means["images"])
            write_histogram(report.pictures.place("histogram.png"), means)
        order = np.argsort(means["images"], kind="stable")
        shown = np.concatenate((order[:SHOWN], order[max(SHOWN, len(order) - SHOWN) :]))
        large = torch.stack([enlarge(picture, MIN_SHOWN) for picture in pictures[shown]])
        report.picture("likely", sheet(large, SHOWN), "the most likely pictures, then the least likely ones", 1)
        maps = surprise_maps(H, models, encode_all(models, pictures[shown]))
        pairs = [(picture, heat(picture, bits, maps.quantile(0.98))) for picture, bits in zip(pictures[shown], maps)]
        large = torch.stack([enlarge(x.expand(3, -1, -1), MIN_SHOWN) for pair in pairs for x in pair])
        report.picture("surprise", sheet(large, 8, group=2, gap=6), "pictures and the surprise of their codes", 1)
        if H.defects:
            maps = surprise_maps(H, models, encode_all(models, spoilt))
            values["defects"] = len(spoilt)
            values["AUROC of a patch's cells"] = float(np.mean([auroc(m[p], m[~p]) for m, p in zip(maps, patches)]))
            values["AUROC of all cells together"] = auroc(maps[patches], maps[~patches])
            pairs = []
            for picture, bits in zip(spoilt[: 2 * SHOWN], maps):
                pairs += [picture.expand(3, -1, -1), heat(picture, bits, maps.quantile(0.98))]
            large = torch.stack([enlarge(x, MIN_SHOWN) for x in pairs])
            report.picture("defects", sheet(large, 8, group=2, gap=6), "pictures with a patch of another", 1)
        report.values(f"{len(names)} pictures ({report.folder / 'likelihood.csv'})", values)


if __name__ == "__main__":
    run_main(dry_run_of_sampler if H.dry_run else main, H)
