"""Metrics that compare the features of real images with those of generated images. Each is one decorated function.

To add one, add a function `name(real, fake, H)` to this file, decorated by `@metric("what it is")`. It returns a
dictionary of numbers. `calc_FID.py --name` then measures it. A network other than Inception is a function like
`inception`, named in the decorator. Imports of other libraries belong inside the functions: the command line lists the
metrics, and --help does not wait for PyTorch.
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
    """One metric; the fields are the arguments of `metric`.

    compute: called with the FeatureSet of the real images, that of the fake ones and H; returns {name: number}.
    """

    compute: Callable
    help: str | None
    extractor: Callable
    keep: bool
    most_real: int
    in_all_processes: bool


METRICS: dict[str, Metric] = {}


def inception(H: Any, device: "torch.device") -> "Inception":
    """The Inception network of the original FID. With --extractor, experiments.common.measure uses another network.

    An extractor maps images, uint8 (B, 3 or 1, H, W), to features (B, D) and logits (B, K), both float32 on the CPU
    (K is 0 if it has no logits). Its attribute `identity`, a dict of JSON values, is part of the keys of caches and
    must differ from that of every other extractor."""
    from utils.evaluation import features

    return features.Inception(H.feature_weights, device)


def metric(
    help: str | None = None,
    extractor: Callable = inception,
    keep: bool = False,
    most_real: int = sys.maxsize,
    in_all_processes: bool = False,
) -> Callable:
    """Decorator: enter a function in METRICS under its name.

    help: the help text of calc_FID.py's flag --<name>; None: there is no such flag.
    extractor: called with H and the device; returns the network (see `inception`).
    keep: whether the function reads `real.features`, (N, D). Otherwise only mean and covariance are kept.
    most_real: the largest number of real images to compare; if there are more, evenly spaced ones are chosen.
    in_all_processes: True: all processes of a job call the function, and `real` and `fake` are None in all but the main
    process. False: only the main process calls it.
    """

    def enter(function: Callable) -> Callable:
        METRICS[function.__name__] = Metric(function, help, extractor, keep, most_real, in_all_processes)
        return function

    return enter


def named(distance: str, H: Any) -> str:
    """The name of a distance: 'fid' or 'kid' with the Inception network, otherwise 'fd_<network>' or 'kd_<network>'."""
    network = getattr(H, "extractor", EXTRACTORS[0])
    return distance if network == EXTRACTORS[0] else f"{distance[0]}d_{network}"


@metric()
def fid(real: "FeatureSet", fake: "FeatureSet", H: Any) -> dict[str, float]:
    """Frechet inception distance (Heusel et al. 2017), by torch-fidelity."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    distance = fid_statistics_to_metric(real.statistics(), fake.statistics(), verbose=False)[KEY_METRIC_FID]
    return {named("fid", H): distance}


@metric("the kernel inception distance (Binkowski et al. 2018) too", keep=True, most_real=100_000)
def kid(real: "FeatureSet", fake: "FeatureSet", H: Any) -> dict[str, float]:
    """Mean and standard deviation of the kernel inception distance over subsets, by torch-fidelity.

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
    """Mean and standard deviation over parts of the samples of their inception score, by torch-fidelity."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    from utils.core.progress import say

    if len(fake.logits) < ISC_SAMPLES:
        say(f"note: the inception score of {len(fake.logits)} samples says little: it is usually taken of 50000")
    found = isc_features_to_metric(fake.logits, splits=min(10, len(fake.logits)))
    return dict(isc=found["inception_score_mean"], isc_std=found["inception_score_std"])


@metric(keep=True, in_all_processes=True)
def prdc(real: "FeatureSet", fake: "FeatureSet", H: Any) -> dict[str, float]:
    """Precision, recall, density and coverage: see utils.evaluation.prdc. All processes share the work."""
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
