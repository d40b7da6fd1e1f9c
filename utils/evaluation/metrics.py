"""Computes metrics that compare the features of real images with the features of generated images. Each metric is one
decorated function.

To add a metric, add a function `name(real, fake, H)` to this file, decorated by `@metric("description")`. The function
returns a dictionary of numbers. `calc_FID.py --name` then measures the metric. For a network other than Inception,
write a function like `inception` and name it in the decorator. Import other libraries inside the functions. The command
line imports this file, and --help must not wait for PyTorch.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from utils.evaluation.features import FeatureSet, Inception

EXTRACTORS = ("inception", "efficientnet_lite0")  # values of --extractor; the first is the original's
KID_SUBSET = 1000
ISC_SAMPLES = 5000


@dataclass(frozen=True)
class Metric:
    """One metric. The fields are the arguments of `metric`.

    compute: compute(real, fake, H) returns {name: number}. real and fake are the FeatureSets of the real and of the
    fake images, H is the configuration.
    """

    compute: Callable
    help: str | None
    extractor: Callable
    keep: bool
    most_real: int
    in_all_processes: bool


METRICS: dict[str, Metric] = {}


def inception(H: Any, device: "torch.device") -> "Inception":
    """Load the Inception network of the original FID. With --extractor, experiments.common.measure uses another
    network.

    An extractor maps images, uint8 (B, 3 or 1, H, W), to features (B, D) and logits (B, K), both float32 on the CPU. K
    is 0 if the network has no logits. The attribute `identity` of an extractor is a dict of JSON values and part of the
    keys of caches. Different extractors must have different identities."""
    from utils.evaluation import features

    return features.Inception(H.feature_weights, device)


def metric(
    help: str | None = None,
    extractor: Callable = inception,
    keep: bool = False,
    most_real: int = sys.maxsize,
    in_all_processes: bool = False,
) -> Callable:
    """Decorate a function so that METRICS lists it under its name.

    help: the help text of calc_FID.py's flag --<name>. With None there is no such flag.
    extractor: a function of H and the device that returns the network (see `inception`).
    keep: True if the function reads `real.features`, (N, D). With False, only mean and covariance are kept.
    most_real: the largest number of real images to compare. If there are more images, evenly spaced images are chosen.
    in_all_processes: True if all processes of a job call the function; `real` and `fake` are then None except in the
    main process. With False, only the main process calls the function.
    """

    def enter(function: Callable) -> Callable:
        METRICS[function.__name__] = Metric(function, help, extractor, keep, most_real, in_all_processes)
        return function

    return enter


def named(distance: str, H: Any) -> str:
    """Return the name of a distance. The name is 'fid' or 'kid' for Inception, and 'fd_<network>' or 'kd_<network>' for
    another network."""
    network = getattr(H, "extractor", EXTRACTORS[0])
    return distance if network == EXTRACTORS[0] else f"{distance[0]}d_{network}"


@metric()
def fid(real: "FeatureSet", fake: "FeatureSet", H: Any) -> dict[str, float]:
    """Compute the Frechet inception distance (Heusel et al. 2017) with torch-fidelity."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    distance = fid_statistics_to_metric(real.statistics(), fake.statistics(), verbose=False)[KEY_METRIC_FID]
    return {named("fid", H): distance}


@metric("the kernel inception distance (Binkowski et al. 2018) too", keep=True, most_real=100_000)
def kid(real: "FeatureSet", fake: "FeatureSet", H: Any) -> dict[str, float]:
    """Compute the mean and standard deviation of the kernel inception distance over subsets, with torch-fidelity.

    The samples are the first input, as on torch-fidelity's command line, because the random subsets depend on the
    order.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    from utils.core.progress import say

    size = min(KID_SUBSET, len(real.features), len(fake.features))
    if size < KID_SUBSET:
        say(f"note: {named('kid', H)} over subsets of {size} images, not {KID_SUBSET}: there are no more")
    found = kid_features_to_metric(fake.features, real.features, kid_subset_size=size, verbose=False)
    mean, std = (found[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return {named("kid", H): mean, f"{named('kid', H)}_std": std}


@metric("the inception score (Salimans et al. 2016) too, of 10 parts of the samples")
def isc(real: "FeatureSet", fake: "FeatureSet", H: Any) -> dict[str, float]:
    """Compute the mean and standard deviation of the inception score over parts of the samples, with torch-fidelity."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    from utils.core.progress import say

    if len(fake.logits) < ISC_SAMPLES:
        say(f"note: the inception score of {len(fake.logits)} samples says little: it is usually taken of 50000")
    found = isc_features_to_metric(fake.logits, splits=min(10, len(fake.logits)))
    return dict(isc=found["inception_score_mean"], isc_std=found["inception_score_std"])


@metric(keep=True, in_all_processes=True)
def prdc(real: "FeatureSet", fake: "FeatureSet", H: Any) -> dict[str, float]:
    """Compute precision, recall, density and coverage (see utils.evaluation.prdc). All processes share the work."""
    from functools import partial

    from utils.core import distributed
    from utils.core.device import pick_device
    from utils.core.progress import say, track
    from utils.evaluation import prdc

    a, b = (distributed.broadcast_tensor(side and side.features) for side in (real, fake))
    if len(a) != len(b):
        say(f"note: {len(a)} training images are compared with {len(b)} samples")
    device = pick_device(H.device)
    progress = partial(track, description="distances", each=distributed.world_size())
    return prdc.prdc(a.to(device), b.to(device), H.nearest_k, progress=progress)
