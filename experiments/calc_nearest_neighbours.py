"""Finds the training images nearest to each sample by a perceptual distance. The result shows if a model copies
images."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import ModelsConfig
from hparams import get_hparams
from hparams.config import OF_SAMPLING, opt


@dataclass
class NeighboursConfig:
    """nearest neighbours"""

    n_samples: int = opt(16, "number of samples whose neighbours are searched", min=1)
    n_neighbours: int = opt(10, "training images to find for each sample", min=1)
    query_batch: int = opt(400, "queries per search; each query takes 2.5 MB at 256 x 256 pixels", min=1)
    query_images: list[str] = opt(
        None,
        "pictures, or folders of pictures, as queries instead of samples; no sampler is needed",
        metavar="PATH",
        replaces=("n_samples", *OF_SAMPLING, "seed"),
    )
    net: str = opt(
        "alexnet",
        "network of the distance; alexnet: LPIPS (Zhang et al. 2018); efficientnet_lite0 needs no download",
        choices=["alexnet", "efficientnet_lite0"],
    )
    alexnet_weights: str = opt(
        None,
        "file with the AlexNet weights for LPIPS (default: torchvision's place, $TORCH_HOME/hub/checkpoints)",
        metavar="PATH",
        needs="net alexnet",
    )


EXAMPLES = """examples:
  python experiments/calc_nearest_neighbours.py --sampler absorbing --dataset churches \\
      --log_dir nearest_neighbours_churches --ae_load_dir vqgan_churches --ae_load_step 2200000 \\
      --load_dir absorbing_churches --load_step 2000000 --ema
  python experiments/calc_nearest_neighbours.py ... --query_images ~/church.jpg ~/more_churches

The script writes logs/<log_dir>/nearest_neighbours.json and images/nearest_neighbours.png. Each row of the picture
shows a query on the left. The neighbours are to the right of the gap, the nearest one first. The picture shows at most
50 queries. The training images are read once for every --query_batch queries, --batch_size at a time.
"""
COMMAND_LINE = dict(
    family="sampler",
    description="Find the training images nearest to each sample.",
    epilog=EXAMPLES,
    extra=(NeighboursConfig, ModelsConfig),
    reads=OF_SAMPLING,
)
if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import statistics
from functools import partial

import torch

from experiments.common.codes import decoded_batches
from experiments.common.efficientnet import load_distance
from experiments.common.images import find_pictures, load_images, read_pictures
from experiments.common.models import dry_run_on_images, load_models, require_size
from experiments.common.results import Report
from experiments.common.sampling import sample_batches
from experiments.common.weights import load_lpips
from utils.core import distributed
from utils.core.device import pick_device
from utils.core.errors import UserError, run_main
from utils.core.files import hash_tensors, write_json
from utils.core.progress import Progress, track
from utils.data.batches import one_pass
from utils.data.pixels import to_float
from utils.display.images import enlarge, sheet
from utils.evaluation.neighbours import find_candidates, nearest_of

MAX_ROWS = 50  # the largest number of rows of the picture
MIN_SHOWN = 96  # pixels: the picture enlarges smaller images to this size


def read_again(images, i):
    """Read image i of an ImageSet a second time. Raises UserError if the file can no longer be read."""
    image = images.load(i)
    if image is None:
        raise UserError(f"{images.source.name(images.indices[i])!r} could be read before, and cannot be read now")
    return image


def own_batches(H, images, device, progress):
    """Yield this process's share of an ImageSet as (floats in [0, 1] (B, C, H, W), numbers of the images (B,))."""
    for x, numbers in one_pass(images, H.batch_size, H.num_workers, shared=True):
        if len(x):
            yield to_float(x.to(device)), numbers
        progress.update(len(x) * distributed.world_size())


def search(H, model, images, queries, device):
    """Find the nearest images in an ImageSet for queries uint8 (Q, C, H, W). Each query gets a list of (distance,
    number of the image). Only the main process gets the lists."""
    world, candidates, groups = distributed.world_size(), [], queries.split(H.query_batch)
    embedding = partial(track, description="embedding queries", unit="query")
    with Progress(len(groups) * len(images), "comparing training images", "img", lazy=True) as progress:
        for group in groups:
            batches = own_batches(H, images, device, progress)
            found = find_candidates(model, to_float(group.to(device)), batches, H.n_neighbours, embedding)
            candidates += found.tolist()

    def load(i):
        return to_float(read_again(images, i).to(device))

    def nearest():
        own = list(zip(queries, candidates, strict=True))[distributed.rank() :: world]
        for query, near in track(own, "measuring the nearest", unit="query", each=world):
            yield nearest_of(model, to_float(query.to(device)), near, load, H.n_neighbours)

    return list(distributed.in_order(nearest()))


def draw_rows(queries, rows, images):
    """Draw a picture, uint8 (C, h, w). Each row shows a query, a gap, and the neighbours."""
    neighbours = [read_again(images, i) for row in rows for _, i in row]
    left, right = (torch.stack([enlarge(x, MIN_SHOWN) for x in xs]) for xs in (queries, neighbours))
    left, right = sheet(left, 1), sheet(right, len(rows[0]))
    gap = torch.full((*left.shape[:2], left.shape[2] // 4), 255, dtype=torch.uint8)
    return torch.cat((left, gap, right), 2)


def drawn_queries(H, models):
    """Draw samples, uint8 (n_samples, C, H, W), for every process."""
    share = sample_batches(models.sampler.model, H.n_samples, H, models.precision, models.device)
    images = list(distributed.in_order(x.cpu() for x in decoded_batches(share, H, models)))
    return distributed.broadcast_tensor(torch.cat(images) if images else None)


def load_net(H):
    """Load the distance of --net -> (distance, name, JSON values about the distance for metrics.jsonl)."""
    if H.net == "alexnet":
        lpips = load_lpips("alex", H.alexnet_weights)
        return lpips, "LPIPS", dict(lpips=hash_tensors(lpips.state_dict()))
    distance = load_distance()
    return distance, f"distance by {H.net}", {H.net: hash_tensors(distance.net.state_dict())}


def main(H):
    device, models = pick_device(H.device), None
    if H.query_images:
        require_size(H)
        names = find_pictures("query_images", H.query_images)
        queries = read_pictures(H, "query_images", names)
    distance, name_of_distance, weights = load_net(H)  # an error here must come before long work
    images = load_images(H, "train")
    if not H.query_images:
        models = load_models(H)
    about = {} if models is None else dict(autoencoder=models.autoencoder, sampler=models.sampler)
    with Report(H, device, **about) as report:
        if models is not None:
            names, queries = range(H.n_samples), drawn_queries(H, models)
        rows = search(H, distance.to(device), images, queries, device)
        if not distributed.is_main():
            return
        found = []
        for name, row in zip(names, rows, strict=True):
            near = [dict(index=i, name=images.source.name(images.indices[i]), distance=d) for d, i in row]
            found.append(dict(query=name, neighbours=near))
        write_json(report.folder / "nearest_neighbours.json", found)
        path = report.picture("nearest_neighbours", draw_rows(queries[:MAX_ROWS], rows[:MAX_ROWS], images), min_side=1)
        nearest = [row[0][0] for row in rows]
        values = dict(median=statistics.median(nearest), minimum=min(nearest), queries=len(rows))
        report.values(
            f"{name_of_distance} to the nearest training image of '{H.dataset}' ({path})",
            dict(values, training_images=len(images) - int(images.broken.sum())),
            **weights,
        )


if __name__ == "__main__":
    run_main(dry_run_on_images if H.dry_run else main, H)
