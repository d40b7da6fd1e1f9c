"""Computes precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of two sets of
features.

The results equal those of the `prdc` package by Naeem et al. The `prdc` package holds three complete matrices of
distances in memory (10 GB each for 50,000 images). The code below computes the distances in tiles and does not keep
them.
"""

from collections.abc import Callable

import torch

from utils.core import distributed
from utils.core.errors import UserError

TILE = 1024  # a tile needs 120 MB at width 2048; larger tiles are not faster on a CPU


@torch.no_grad()
def prdc(
    real: torch.Tensor, fake: torch.Tensor, nearest_k: int = 3, tile: int = TILE, progress: Callable = iter
) -> dict[str, float]:
    """Compare the features `real` (N, D) with `fake` (M, D), both float32. Returns a dict of floats.

    Each row has a ball. Its radius is the distance to the k-th nearest other row of the same set, k = nearest_k; the
    surface does not belong to the ball. precision: share of fake rows in a real ball. recall: share of real rows in a
    fake ball. density: mean number of real balls that contain a fake row, divided by nearest_k. coverage: share of real
    balls that contain a fake row.

    tile: the number of rows and columns of distances that are computed at once. progress: a function that gets a list
    of tiles and returns an iterable of the tiles; it is called three times. The computation is in float64 on the device
    of `real`, or on the CPU if this device lacks float64. Several processes share the tiles. Each process needs the
    features and gets the result. Raises UserError if the sets are too small, have different widths, or are not finite.
    """
    real, fake = (x.cpu() if x.device.type == "mps" else x for x in (real, fake))  # Apple's GPUs (MPS) have no float64
    fake = fake.to(real.device)
    check(real, fake, nearest_k, tile)
    real_radii = ball_radii(real, nearest_k, tile, progress)
    fake_radii = ball_radii(fake, nearest_k, tile, progress)
    in_real, in_fake, covered = (torch.zeros(len(x), dtype=torch.bool, device=real.device) for x in (fake, real, real))
    pairs = torch.zeros((), dtype=torch.int64, device=real.device)
    tiles = [(rows, cols) for rows in spans(len(real), tile) for cols in spans(len(fake), tile)]
    for rows, cols in progress(own_share(tiles)):
        d = distances(real[rows], fake[cols])
        inside = d < real_radii[rows, None]
        pairs += inside.sum()
        in_real[cols] |= inside.any(0)
        covered[rows] |= inside.any(1)
        in_fake[rows] |= (d < fake_radii[cols]).any(1)
    in_real, in_fake, covered = (distributed.all_reduce_sum(x.int()) > 0 for x in (in_real, in_fake, covered))
    distributed.all_reduce_sum(pairs)
    precision, recall, coverage = (x.double().mean().item() for x in (in_real, in_fake, covered))
    return dict(precision=precision, recall=recall, density=pairs.item() / (nearest_k * len(fake)), coverage=coverage)


def check(real: torch.Tensor, fake: torch.Tensor, nearest_k: int, tile: int) -> None:
    """Raise UserError for sets that cannot be compared."""
    if real.shape[1] != fake.shape[1]:
        raise UserError(
            f"features of width {real.shape[1]} and {fake.shape[1]} cannot be compared: use one extractor for both"
        )
    for name, x in (("real", real), ("fake", fake)):
        # The prdc package needs one row more than the neighbours and the row itself.
        if len(x) < nearest_k + 2:
            raise UserError(
                f"{len(x)} {name} images are too few for {nearest_k} nearest neighbours: "
                f"use {nearest_k + 2} or more, or a smaller nearest_k"
            )
        if not all(x[rows].isfinite().all() for rows in spans(len(x), tile)):
            raise UserError(f"the {name} features hold NaN or infinity: check the images and the extractor's weights")


def spans(n: int, tile: int) -> list[slice]:
    """Return slices of at most `tile` items that together cover range(n)."""
    return [slice(start, min(start + tile, n)) for start in range(0, n, tile)]


def ball_radii(x: torch.Tensor, nearest_k: int, tile: int, progress: Callable) -> torch.Tensor:
    """Return the distance of each row of x (N, D) to its k-th nearest other row, (N,) float32. k is nearest_k."""
    nearest = torch.full((len(x), nearest_k + 1), float("inf"), device=x.device)  # + 1 for the row itself

    def see(rows: slice, d: torch.Tensor) -> None:
        nearest[rows] = torch.cat([nearest[rows], d], 1).topk(nearest_k + 1, dim=1, largest=False).values

    parts = spans(len(x), tile)
    upper = [(i, j) for j in range(len(parts)) for i in range(j + 1)]
    for i, j in progress(own_share(upper)):
        d = distances(x[parts[i]], x[parts[j]])
        see(parts[i], d)
        if i != j:  # the transpose of this tile is the tile below the diagonal
            see(parts[j], d.T)
    if distributed.world_size() > 1:
        nearest = torch.cat(distributed.from_all(nearest.cpu()), 1).to(x.device)
        nearest = nearest.topk(nearest_k + 1, dim=1, largest=False).values
    return nearest.amax(1)


def own_share(tiles: list) -> list:
    return tiles[distributed.rank() :: distributed.world_size()]


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distances of rows a (n, D) and b (m, D), (n, m) float32. The rounding is that of
    scikit-learn."""
    a, b = a.double(), b.double()
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(scale, a, b.T, alpha=-2)
    # A squared distance below its possible rounding error is noise, and becomes 0. Equal rows must have distance 0, and
    # no row may be inside a ball of radius 0. Both must hold for any order of the sums in the matrix product.
    noise = (a.shape[1] + 2) * torch.finfo(torch.float64).eps
    squared.masked_fill_(squared <= noise * scale, 0)
    # The square is rounded to float32 first, then its root. torch's float32 root on the CPU is wrong in the last digit
    # for one number in five, which changes ties. The float64 root, rounded to float32, is exact.
    return squared.float().double().sqrt_().float()
