"""Computes and caches features of images and the statistics of these features.

Features are those of torch-fidelity's 'inception-v3-compat' (the weights of the original FID, converted).
The name of a cache file depends on everything that the features depend on: the images, their size and
resizing, the weights of the extractor, or the models, seed and temperature of the samples.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core import cache, distributed
from utils.core.errors import DamagedFile, UserError
from utils.core.files import hash_json, load_npy, load_tensors, sha256_file
from utils.core.job import FEATURES
from utils.evaluation.weight_files import WEIGHT_FILES, missing

FORMAT = 1  # the version of the file format, stored in the header
EXTRACTOR = "inception-v3-compat"


class Inception:
    """The feature extractor. Raises UserError if its weights are missing or do not fit.

    weights_path: the file of the weights (default: torch-fidelity's own location).
    """

    def __init__(self, weights_path: str | Path | None, device: torch.device):
        if not weights_path and (line := missing("inception")):
            raise UserError(line)
        path = weights_path or WEIGHT_FILES["inception"].place
        load_tensors(path)  # torch-fidelity would run code in the file; load_tensors refuses such a file
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # takes seconds

        try:
            self.net = FeatureExtractorInceptionV3(
                EXTRACTOR, ["2048", "logits_unbiased"], feature_extractor_weights_path=path
            ).to(device)
        except (RuntimeError, TypeError, AttributeError) as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not hold torch-fidelity's Inception weights: {detail}") from None
        self.device = device
        self.identity = dict(extractor=EXTRACTOR, weights=sha256_file(path))

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute features (B, 2048) and logits (B, 1008), float32 on the CPU, of images, uint8 (B, 3 or 1, H, W)."""
        x = x.to(self.device).expand(-1, 3, -1, -1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.net(x)
        return features.cpu(), logits.cpu()


@dataclass
class FeatureSet:
    """Features of N images. Each tensor is None if it was not requested.

    mu, sigma: mean (D,) and covariance (D, D), float64. features: (N, D). logits: (N, K). left_out: int64 (m,), the
    positions of images that could not be decoded.
    """

    count: int
    mu: Any = None
    sigma: Any = None
    features: Any = None
    logits: Any = None
    left_out: Any = None

    def statistics(self) -> dict[str, np.ndarray]:
        """The statistics in the form that torch-fidelity's FID expects."""
        return dict(mu=self.mu.numpy(), sigma=self.sigma.numpy())


def collect(pairs: Iterable, what: str, keep: bool = False, logits: bool = False) -> FeatureSet | None:
    """Compute a FeatureSet from batches of features and logits, ((b, 2048), (b, 1008)) each.

    The statistics are summed batch by batch in float64, so that millions of images need little memory. keep: also keep
    the features (8 KiB per image). logits: also keep the logits (4 KiB). what: the name of the images in the UserError
    that is raised for fewer than 2 images. Only the main process has all pairs and gets the result; the other processes
    get None.
    """
    count, kept, kept_logits = 0, [], []
    first: Any = 0.0
    second: Any = 0.0
    for features, classes in pairs:
        f = features.double()
        first, second, count = first + f.sum(0), second + f.T @ f, count + len(f)
        if keep:
            kept.append(features)
        if logits:
            kept_logits.append(classes)
    if not distributed.is_main():
        return None
    if count < 2:
        raise UserError(f"{what}: {count} image(s): statistics need two or more")
    mu = first / count
    sigma = (second - count * torch.outer(mu, mu)) / (count - 1)
    return FeatureSet(count, mu, sigma, torch.cat(kept) if keep else None, torch.cat(kept_logits) if logits else None)


def cache_path(header: dict) -> Path:
    """Return the path features/<kind>_<key>.pt. The key is a hash of the whole header."""
    return FEATURES / f"{header['kind']}_{hash_json(dict(header, format=FORMAT))}.pt"


def origin(images: Any = None) -> dict:
    """Return the origin of features, which utils.core.cache.is_current compares. images: an ImageSet, or None for
    features of samples."""
    own = cache.versions("torch-fidelity")
    if images is None:
        return dict(versions=own)
    found = images.origin()
    return dict(found, versions={**found["versions"], **own})


def store(header: dict, found: FeatureSet, say: Callable) -> None:
    """Store the FeatureSet of samples, if the disk is writable. header: a dict of JSON values with everything that the
    features depend on."""
    header = dict(header, format=FORMAT)
    cache.store(cache_path(header), header, _tensors(found), say, f"{header['kind']} features", origin())


def cached(header: dict, compute: Callable, say: Callable, images: Any = None) -> FeatureSet | None:
    """Return the FeatureSet of this header. The features are read from features/, or computed by compute() and then
    stored. Only the main process gets the result; the other processes get None. images: the ImageSet of the features,
    whose missing images are reported. For samples, `images` is None, and the number of samples is the header's `n`."""
    path = cache_path(header)
    n, most_missing = (header["n"], 0) if images is None else (len(images), images.most_broken())

    def check(found: dict) -> None:
        if not _fits(found, header, n, most_missing):
            raise DamagedFile(f"{path} holds no features of {n} images")

    tensors = cache.cached(
        path,
        dict(header, format=FORMAT),
        lambda: _tensors(compute()),
        say,
        f"{header['kind']} features",
        lambda: origin(images),
        check,
        renew=True,
    )
    found = FeatureSet(**{**tensors, "count": int(tensors["count"])}) if tensors else None
    if images is not None:
        images.leave_out(found and found.left_out, n - found.count if found else 0, path, say)
    return found


def _fits(found: dict, header: dict, n: int, most_missing: int) -> bool:
    """Return whether the tensors of a file fit the header and n images. At most `most_missing` images may be
    missing."""
    wanted = {"count", "mu", "sigma"}
    wanted |= {"features", "logits"} if header["kind"] == "samples" else {"features"} if header["keep"] else set()
    if not wanted <= set(found) <= {field.name for field in fields(FeatureSet)}:
        return False
    count, mu, sigma = found["count"], found["mu"], found["sigma"]
    if count.dtype != torch.int64 or count.ndim or not 2 <= count <= n or count < n - most_missing:
        return False
    fits = mu.dtype == sigma.dtype == torch.float64 and mu.ndim == 1 and sigma.shape == (len(mu), len(mu))
    for name in wanted & {"features", "logits"}:
        rows = found[name]
        fits = fits and rows.is_floating_point() and rows.ndim == 2 and len(rows) == count
        fits = fits and (name == "logits" or rows.shape[1] == len(mu))
    return fits and ("left_out" not in found or cache.fits_range(found["left_out"], n - int(count), range(n)))


def _tensors(s: FeatureSet | None) -> Any:
    if s is None:
        return None
    values = {**vars(s), "count": torch.tensor(s.count)}
    return {k: v for k, v in values.items() if v is not None}


def tensor_of_npy(path: str | Path) -> torch.Tensor:
    """Load the array of a .npy file as a tensor. Raises UserError if a tensor cannot hold the array."""
    array = load_npy(path)
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):  # an archive of arrays, text, or another byte order
        raise UserError(f"{path} is not an array of numbers in this machine's byte order") from None


def is_plain(value: Any) -> bool:
    """Return whether a value is an ordinary tensor of numbers. Sparse tensors, quantized tensors and tensors on the
    meta device are not."""
    return torch.is_tensor(value) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def regroup(batches: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Convert batches of any lengths to batches of `size` rows. The order of the rows stays the same. The last batch
    may be smaller."""
    waiting: list[torch.Tensor] = []
    n = 0
    for x in batches:
        waiting.append(x)
        n += len(x)
        while n >= size:
            rows = torch.cat(waiting)
            yield rows[:size]
            waiting, n = [rows[size:]], n - size
    if n:
        yield torch.cat(waiting)
