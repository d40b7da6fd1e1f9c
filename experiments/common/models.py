"""Loads the models that a command line names, and checks that the models belong together."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from experiments.common.images import note_images
from experiments.common.weights import Loaded, load_autoencoder, load_sampler, note_missing_weights
from hparams.sources import require_folder, same_images
from models.build import build_sampler
from models.pretrained import recorded_autoencoder, recorded_config
from models.summary import describe_sampler, print_dry_run
from utils.core.checkpoint import LOGS, checkpoints_of
from utils.core.device import pick_device
from utils.core.errors import UserError
from utils.core.files import read_json
from utils.core.progress import say
from utils.data.images import Say
from utils.data.sources import open_source
from utils.evaluation.metrics import EXTRACTORS
from utils.training.amp import Precision
from utils.training.run import Run
from utils.training.start import agree_on_steps


@dataclass
class Models:
    """The models of an experiment. load_models with with_sampler=False gives no sampler (None)."""

    device: torch.device
    precision: Precision
    autoencoder: Loaded
    sampler: Any  # Loaded or None


def load_models(H: SimpleNamespace, with_sampler: bool = True) -> Models:
    """Load the model of --ae_load_dir, and with with_sampler also the model of --load_dir."""
    device = pick_device(H.device)
    if with_sampler and not H.load_step:
        raise UserError("--load_dir must name a trained sampler")
    agree_on_steps(H)
    autoencoder = load_autoencoder(H, device, (checkpoints_of(H.load_dir), H.load_step) if with_sampler else None)
    sampler = load_sampler(H, device) if with_sampler else None
    if with_sampler and not H.allow_other_ae:
        check_pair(H, autoencoder)
    warn_of_other_data(H, *(H.load_dir, H.load_step) if with_sampler else (H.ae_load_dir, H.ae_load_step))
    return Models(device, Precision(H.amp, H.amp_dtype, device), autoencoder, sampler)


def require_size(H: SimpleNamespace) -> None:
    """Check the flags of a command that loads no model and needs only the size of the images from --ae_load_dir. Raise
    UsageError if this folder does not exist and --img_size is not given."""
    if "img_size" not in H.explicit:
        require_folder("ae_load_dir", H.ae_load_dir)


def check_autoencoder(run: Run, autoencoder: Loaded) -> None:
    """Raise UserError if a resumed run has another autoencoder than before. The run's manifests record the
    autoencoder."""
    known = (run.manifest or {}).get("autoencoder")
    if known and known["hash"] != autoencoder.hash:
        raise UserError(
            f"{run.folder} was trained with {known['path']}, which is not {autoencoder.path}: "
            "give that autoencoder, or another --log_dir"
        )
    run.about["autoencoder"] = dict(path=autoencoder.path, hash=autoencoder.hash)


def check_pair(H: SimpleNamespace, autoencoder: Loaded) -> None:
    """Raise UserError if the sampler was trained on codes of another autoencoder. Without a recorded autoencoder in the
    sampler's run, there is no check."""
    known = recorded_autoencoder(checkpoints_of(H.load_dir), H.load_step)
    if known and known["hash"] != autoencoder.hash:
        raise UserError(
            f"the sampler logs/{H.load_dir} (step {H.load_step}) was trained on the codes of "
            f"{known['path']}, which is not {autoencoder.path}: give that autoencoder (or --allow_other_ae)"
        )


def dry_run_on_images(H: SimpleNamespace) -> None:
    """Do the --dry_run of a script that uses a sampler and the images of --dataset."""
    dry_run_of_sampler(H)
    note_images(H)


def warn_of_other_data(H: SimpleNamespace, folder: str, step: int) -> None:
    """Warn if --dataset is not the data set that the run logs/<folder> was trained on."""
    trained, now = recorded_config(checkpoints_of(folder), step), vars(H)
    if not trained.get("dataset"):
        return  # a published checkpoint records no data set
    if not H.data_entry["paths"]:  # the script reads no images, so the command line may leave them out
        now = dict(now, custom_dataset_path=trained.get("custom_dataset_path"))
    if not same_images(trained, now):
        names = [
            f"'{values['dataset']}'" + (f" ({path})" if (path := values.get("custom_dataset_path")) else "")
            for values in (trained, now)
        ]
        say(f"warning: {LOGS}/{folder} was trained on the data set {names[0]}, and --dataset names {names[1]}")


def note_if_seen(H: SimpleNamespace, say: Say = say) -> None:
    """Print a note if the sampler was trained on all images, including the validation images that are used now."""
    path = LOGS / H.load_dir / "config.json"
    if not path.is_file() or open_source(H.data_entry, "val") is not None:
        return
    trained = read_json(path).get("hparams", {})
    if same_images(trained, vars(H)) and not trained.get("steps_per_eval"):
        say(
            f"note: {LOGS / H.load_dir} was trained without validation, on all images: the images evaluated "
            "here were among them"
        )


def dry_run_of_sampler(H: SimpleNamespace) -> None:
    """Do the --dry_run of a script that uses a sampler."""
    with torch.device("meta"):
        print_dry_run(H, describe_sampler(H, build_sampler(H)))
    needed = dict(inception=("extractor", EXTRACTORS[0]), alexnet=("net", "alexnet"))
    note_missing_weights(H, *(name for name, (flag, value) in needed.items() if getattr(H, flag, None) == value))
