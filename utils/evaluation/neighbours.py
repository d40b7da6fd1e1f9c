"""Finds the nearest of many images by LPIPS (Zhang et al. 2018). Each image is embedded once, and its embedding is not
kept.

LPIPS is a squared Euclidean distance between weighted features of unit length over the channels:

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lchw(x) - f_lchw(y))^2

Therefore one matrix product gives the distances |a|^2 + |b|^2 - 2ab of all queries to a batch of images. This formula
loses digits if two images are similar. Therefore the search has two passes. The first pass selects a few more
candidates than requested. The second pass computes LPIPS itself for these candidates.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.core import distributed

MIN_SIDE = 31  # pixels; the smallest side that AlexNet accepts (conv 11 / 4, two pools 3 / 2)
SPARE = 10  # candidates in addition to k, because the first pass can confuse distances that differ by 1e-6
PIECE = 1 << 14  # the number of features in one matrix product


@contextmanager
def exact() -> Iterator[None]:
    """Disable gradients, and run convolutions in float32. By default a GPU may use TF32, which has only three
    digits."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def lpips_input(x: torch.Tensor) -> torch.Tensor:
    """Convert images in [0, 1], (B, 3 or 1, H, W), to the input format of LPIPS, (B, 3, H', W') in [-1, 1].

    Grey is repeated for all colours. The network does not accept images below MIN_SIDE pixels. Such images are enlarged
    by repeating pixels, with the smallest integer factor that makes both sides large enough.
    """
    factor = math.ceil(MIN_SIDE / min(x.shape[2:]))
    if factor > 1:
        x = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return 2 * x.expand(-1, 3, -1, -1) - 1


@exact()
def lpips_features(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute features a (B, D) float32 and signs s (D,), 1 or -1, of images in [0, 1], (B, 3 or 1, H, W).

    LPIPS(x, y) = sum_i s_i (a_i(x) - a_i(y))^2. model (also in the functions below): lpips.LPIPS, or a distance of
    images in [0, 1] with a method `embed`, such as models.efficientnet.PerceptualDistance. The features include the
    weights of LPIPS's heads. The published weights are not negative, so all signs are 1. With AlexNet at 256 x 256
    pixels D is 640,128.
    """
    if hasattr(model, "embed"):
        features = model.embed(x)
        return features, torch.ones_like(features[0])
    import lpips

    features, signs = [], []
    for out, head in zip(model.net(model.scaling_layer(lpips_input(x))), model.lins, strict=True):
        weight = head.model[-1].weight / out[0, 0].numel()  # (1, C, 1, 1)
        features.append((lpips.normalize_tensor(out) * weight.abs().sqrt()).flatten(1))
        signs.append(torch.where(weight < 0, -1.0, 1.0).expand_as(out[:1]).flatten())
    return torch.cat(features, 1), torch.cat(signs)


@exact()
def lpips_of_pairs(model: Any, query: torch.Tensor, images: Iterable[torch.Tensor]) -> list[float]:
    """Return the LPIPS distances of one image (C, H, W) to N images (N, C, H, W), all in [0, 1], as a list of floats.

    Each call of the model gets one pair. In larger batches the eighth digit is rounded differently, and equal images
    would get different distances.
    """
    prepared = (lambda x: x[None]) if hasattr(model, "embed") else (lambda x: lpips_input(x[None]))
    return [model(prepared(query), prepared(image)).item() for image in images]


class QueryDistances:
    """Computes LPIPS distances of Q queries to any number of images, by matrix products. The error is below 1e-6
    (measured at 256 x 256 pixels).

    queries: floats in [0, 1], (Q, C, H, W). The features of the queries stay in memory. Each query of 256 x 256 pixels
    needs 2.5 MB, and each image of a batch needs 2.5 MB, too. A few hundred queries fit on any GPU.
    """

    def __init__(self, model: Any, queries: torch.Tensor, progress: Callable = iter):
        self.model = model
        parts = [lpips_features(model, x) for x in progress(queries.split(1))]
        self.features, self.signs = torch.cat([features for features, _ in parts]), parts[0][1]
        self.squares = (self.features.square() * self.signs).sum(1)
        self.features *= self.signs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the distances (Q, B) of the queries to images (B, C, H, W) in [0, 1]."""
        b, _ = lpips_features(self.model, x)
        # The products are summed in pieces, because a single float32 sum of 640,000 products is wrong in the fifth
        # digit.
        products: Any = sum(p @ q.T for p, q in zip(self.features.split(PIECE, 1), b.split(PIECE, 1), strict=True))
        return self.squares[:, None] + (b.square() * self.signs).sum(1) - 2 * products


class NearestK:
    """Keeps the k + SPARE nearest images of each query among all images added so far. After `merge`, the images of all
    processes count. Other images are not kept.

    The attributes `distances` and `indices`, (Q, up to k + SPARE) on the CPU, are sorted by (distance, index).
    """

    def __init__(self, n_queries: int, k: int):
        self.size = k + SPARE
        self.distances = torch.empty(n_queries, 0)
        self.indices = torch.empty(n_queries, 0, dtype=torch.int64)

    def update(self, distances: torch.Tensor, indices: torch.Tensor) -> None:
        """Add images: distances (Q, B), and the numbers of the images (B,). No number may be added twice."""
        self._take(distances.cpu(), indices.expand(len(distances), -1))

    def _take(self, distances: torch.Tensor, indices: torch.Tensor) -> None:
        """Add images with distances and indices, both (Q, B) on the CPU."""
        distances, indices = torch.cat((self.distances, distances), 1), torch.cat((self.indices, indices), 1)
        by_index = indices.argsort(1)  # the stable sort below keeps this order for equal distances
        distances, indices = distances.gather(1, by_index), indices.gather(1, by_index)
        self.distances, order = distances.sort(dim=1, stable=True)
        self.distances = self.distances[:, : self.size]
        self.indices = indices.gather(1, order[:, : self.size])

    def merge(self) -> None:
        """Add the results of the other processes of the job. All processes call this method."""
        own, *others = distributed.from_all((self.distances, self.indices))
        self.distances, self.indices = own
        for distances, indices in others:
            self._take(distances, indices)


def find_candidates(
    model: Any, queries: torch.Tensor, batches: Iterable, k: int, progress: Callable = iter
) -> torch.Tensor:
    """First pass: return the numbers of the images nearest to each query, int64 (Q, k + SPARE). Rounding can change the
    order. With few images, the result has fewer columns.

    queries: floats in [0, 1], (Q, C, H, W). batches: iterable of (images (B, C, H, W), numbers (B,)). Each image occurs
    once, in one process of the job. progress: a function that gets the list of queries and returns an iterable of the
    queries. If the distances of more than SPARE images equal the k-th distance to 1e-6, the choice among these images
    is arbitrary.
    """
    found, distances = NearestK(len(queries), k), QueryDistances(model, queries, progress)
    for x, numbers in batches:
        found.update(distances(x), numbers)
    found.merge()
    return found.indices


def nearest_of(
    model: Any, query: torch.Tensor, candidates: list[int], load: Callable, k: int
) -> list[tuple[float, int]]:
    """Second pass: return the k candidates nearest to a query (C, H, W), as a list of (distance, number). The nearest
    is first.

    candidates: the numbers of images. load: a function of a number that returns the image, (C, H, W). The distances are
    those of LPIPS for single pairs. Images of equal distance are in the order of their numbers.
    """
    values = lpips_of_pairs(model, query, map(load, candidates))
    return sorted(zip(values, candidates, strict=True))[:k]
