"""Flags of the experiments, in addition to those of hparams/config.py. Standard library only, to keep --help fast."""

from dataclasses import dataclass, make_dataclass

from hparams.config import opt
from utils.evaluation.metrics import METRICS


@dataclass
class ModelsConfig:
    """models together"""

    allow_other_ae: bool = opt(False, "use the sampler even with an autoencoder that it was not trained with")


@dataclass
class FeaturesConfig:
    """features"""

    feature_weights: str = opt(
        None,
        "file with the Inception weights (default: where torch-fidelity puts it, $TORCH_HOME/hub/checkpoints)",
        metavar="PATH",
    )
    feature_batch: int = opt(64, "images in one pass of the Inception network (of samples at most --batch_size)", min=1)


# --<name> for each metric that describes itself.
MetricFlags = make_dataclass(
    "MetricFlags", [(name, bool, opt(False, metric.help)) for name, metric in METRICS.items() if metric.help]
)
