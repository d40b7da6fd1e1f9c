"""Declares flags of the experiments, in addition to the flags of hparams/config.py. To keep --help fast, the imported
modules use only the standard library."""

from dataclasses import dataclass, make_dataclass
from typing import Any

from hparams.config import opt
from utils.core.errors import UsageError
from utils.evaluation.metrics import EXTRACTORS, METRICS

AGAINST = ("images", "reconstructions")  # values of --against


@dataclass
class ModelsConfig:
    """models together"""

    allow_other_ae: bool = opt(False, "accept an autoencoder that the sampler was not trained with")


@dataclass
class CanvasConfig:
    """larger images"""

    window_batch: int = opt(64, "windows in one network pass", "advanced", min=1)
    decode_tile: int = opt(32, "side in latents of tiles for decoding larger canvases; 0: no tiles", "advanced", min=0)


@dataclass
class FeaturesConfig:
    """features"""

    extractor: str = opt(
        EXTRACTORS[0],
        "network of the features; efficientnet_lite0 needs no download",
        choices=list(EXTRACTORS),
    )
    feature_weights: str = opt(
        None,
        "file with the Inception weights (default: in $TORCH_HOME/hub/checkpoints)",
        metavar="PATH",
        needs=f"extractor {EXTRACTORS[0]}",
    )
    feature_batch: int = opt(
        64, "images in one pass of the network (of samples at most --batch_size)", "advanced", min=1
    )


@dataclass
class AgainstConfig:
    """features"""

    against: str = opt(
        AGAINST[0],
        f"{' or '.join(AGAINST)}: what samples are compared with; reconstructions, those of the training images by the "
        "autoencoder, leave the error of the prior alone",
        choices=list(AGAINST),
        metavar="NAME",
    )


# Each metric with a help text has a flag --<name>.
MetricFlags = make_dataclass(
    "MetricFlags", [(name, bool, opt(False, metric.help)) for name, metric in METRICS.items() if metric.help]
)


def check_show_steps(H: Any) -> None:
    """Refuse --show_steps for samples that do not draw each code once."""
    if H.show_steps and H.sampler == "absorbing" and H.sample_type == "mlm":
        raise UsageError("--show_steps shows --sample_type diffusion (and autoregressive sampling), not mlm")
    if H.show_steps and H.remask_eta:
        raise UsageError("--show_steps contradicts --remask_eta: it needs codes that are drawn once")
