"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of two sets of features.

The numbers are those of the latter's `prdc` package, which holds three complete matrices of distances in memory
(10 GB each for 50,000 images). Here the distances are computed in tiles and not kept.
"""

from collections.abc import Callable

import torch

from utils.core import distributed
from utils.core.errors import UserError

TILE = 1024  # 120 MB in addition to features of width 2048 (measured); larger tiles are not faster on a CPU


@torch.no_grad()
def prdc(
    real: torch.Tensor, fake: torch.Tensor, nearest_k: int = 3, tile: int = TILE, progress: Callable = iter
) -> dict[str, float]:
    """Compare features real (N, D) with fake (M, D), float32 -> dict of floats.

    A row's ball reaches to its nearest_k-th nearest other row of its own set (the surface is outside).
    precision: share of fake rows in a real ball; recall: share of real rows in a fake ball; density: real
    balls that a fake row is in, on average, over nearest_k; coverage: share of real balls with a fake row.

    tile: rows and columns of distances at a time; progress: called with a list of tiles (three times),
    returns an iterable of them. Computed in float64 on real's device, or on the CPU if that device lacks float64.
    Several processes, which all have the features, share the tiles; each gets the result.
    Raises UserError for sets that are too small, of different widths or not finite.
    """
    real, fake = (x.cpu() if x.device.type == "mps" else x for x in (real, fake))  # MPS has no float64
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
        # One more than the neighbours and the row itself: as the prdc package demands.
        if len(x) < nearest_k + 2:
            raise UserError(
                f"{len(x)} {name} images are too few for {nearest_k} nearest neighbours: "
                f"use {nearest_k + 2} or more, or a smaller nearest_k"
            )
        if not all(x[rows].isfinite().all() for rows in spans(len(x), tile)):
            raise UserError(f"the {name} features hold NaN or infinity: check the images and the extractor's weights")


def spans(n: int, tile: int) -> list[slice]:
    """Slices of at most `tile` that make up range(n)."""
    return [slice(start, min(start + tile, n)) for start in range(0, n, tile)]


def ball_radii(x: torch.Tensor, nearest_k: int, tile: int, progress: Callable) -> torch.Tensor:
    """Distance of each row of x (N, D) to its nearest_k-th nearest other row, (N,) float32."""
    nearest = torch.full((len(x), nearest_k + 1), float("inf"), device=x.device)  # one more: 0 to the row itself

    def see(rows: slice, d: torch.Tensor) -> None:
        nearest[rows] = torch.cat([nearest[rows], d], 1).topk(nearest_k + 1, dim=1, largest=False).values

    parts = spans(len(x), tile)
    upper = [(i, j) for j in range(len(parts)) for i in range(j + 1)]
    for i, j in progress(own_share(upper)):
        d = distances(x[parts[i]], x[parts[j]])
        see(parts[i], d)
        if i != j:  # the tile below the diagonal is this one's transpose
            see(parts[j], d.T)
    if distributed.world_size() > 1:
        nearest = torch.cat(distributed.from_all(nearest.cpu()), 1).to(x.device)
        nearest = nearest.topk(nearest_k + 1, dim=1, largest=False).values
    return nearest.amax(1)


def own_share(tiles: list) -> list:
    return tiles[distributed.rank() :: distributed.world_size()]


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of rows a (n, D) and b (m, D): (n, m) float32, rounded as scikit-learn rounds them."""
    a, b = a.double(), b.double()
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(scale, a, b.T, alpha=-2)
    # A squared distance that is smaller than its possible rounding error is noise. Equal rows must be at 0, and no
    # row inside a ball of radius 0, however the matrix product orders its sums.
    noise = (a.shape[1] + 2) * torch.finfo(torch.float64).eps
    squared.masked_fill_(squared <= noise * scale, 0)
    # The square is rounded, then its root. torch's root of float32 can be off by its last digit (on the CPU:
    # one in five), which changes the ties; the rounded root of float64 is exact.
    return squared.float().double().sqrt_().float()
