"""Loads the weights that a command line names, for the autoencoder, the sampler and LPIPS."""

import os
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models.pretrained import (
    Loaded,
    autoencoder_of,
    find_weights,
    named,
    named_weights,
    recorded_autoencoder,
    sampler_of,
)
from utils.core.checkpoint import Checkpoints, load_into
from utils.core.errors import UserError
from utils.core.files import load_tensors
from utils.core.progress import say
from utils.evaluation.weight_files import WEIGHT_FILES, missing

LPIPS_NETS = {"vgg": "vgg", "alex": "alexnet"}  # {name in the package lpips: name in weight_files}


def load_autoencoder(
    H: SimpleNamespace, device: torch.device, sampler: tuple[Checkpoints, int] | None = None
) -> Loaded:
    """Load the VQGAN's autoencoder of --ae_load_dir, --ae_load_step.

    sampler: (Checkpoints, step) of the sampler that uses the autoencoder. The training of this sampler used averaged
    weights or raw weights, and the function loads the same kind. If sampler is None, --weights decides.
    """
    raw = named_weights(recorded_autoencoder(*sampler)) == ("vqgan", H.ae_load_step) if sampler else H.weights == "raw"
    return autoencoder_of(H, *find_weights("vqgan", H.ae_load_dir, H.ae_load_step, raw), device)


def load_sampler(H: SimpleNamespace, device: torch.device) -> Loaded:
    """Load the sampler of --load_dir, --load_step."""
    return sampler_of(H, *find_weights(H.sampler, H.load_dir, H.load_step, H.weights == "raw"), device)


# ---------------------------------------------------------------------- LPIPS


def load_lpips(
    net: str, weights_path: str | None = None, checkpoint: str | None = None, otherwise: str = ""
) -> nn.Module:
    """Load LPIPS (Zhang et al. 2018) with VGG16 ('vgg') or AlexNet ('alex'), frozen. The function downloads nothing.

    weights_path: torchvision's state dict of the network, or a state dict of the complete LPIPS or VQGAN
    (`perceptual.*`); default: torchvision's own location. checkpoint: the path of a VQGAN checkpoint that is loaded
    later; if the checkpoint holds `perceptual.*`, no other file is needed. otherwise: another remedy, for the
    message. Raises UserError if the weights are missing or do not fit.
    """
    path = weights_path or WEIGHT_FILES[LPIPS_NETS[net]].place
    if not weights_path and (line := missing(LPIPS_NETS[net])):
        if checkpoint is None or not os.path.isfile(checkpoint) or not has_perceptual(checkpoint):
            raise UserError(line + otherwise)
        path = checkpoint
    state = named(load_tensors(path), path)
    import lpips

    with warnings.catch_warnings():  # lpips causes warnings, because it uses an outdated interface of torchvision
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    load_into(model, to_lpips_names(state, model), path)
    return model.eval().requires_grad_(False)


def has_perceptual(path: str) -> bool:
    return any(k.startswith("perceptual.net.") for k in named(load_tensors(path), path))


def to_lpips_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give the tensors of a VGG16, AlexNet, LPIPS or VQGAN the names of LPIPS. The linear heads may come from
    `model`."""
    if any(k.startswith("perceptual.") for k in state):
        state = {k.removeprefix("perceptual."): v for k, v in state.items() if k.startswith("perceptual.")}
    own = model.state_dict()
    result = {k: v for k, v in own.items() if not k.startswith("net.")}
    for name in own:
        if name in state:
            result[name] = state[name]
        elif name.startswith("net.") and "features." + name.split(".", 2)[2] in state:
            result[name] = state["features." + name.split(".", 2)[2]]
    return result


def note_missing_weights(H: Any, *names: str) -> None:
    """For --dry_run: print one line for each missing file of weights that the command line H needs. names: keys of
    weight_files.WEIGHT_FILES."""
    for name in names:
        if line := missing(name, getattr(H, WEIGHT_FILES[name].flag)):
            say(f"note: {line}")
