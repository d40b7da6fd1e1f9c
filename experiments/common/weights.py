"""The one place that loads weights for use: autoencoder, sampler, LPIPS."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models.build import build_autoencoder, build_sampler
from utils.core.checkpoint import Checkpoints, checkpoints_of, load_into
from utils.core.errors import DamagedFile, UserError
from utils.core.files import hash_tensors, load_tensors
from utils.core.progress import say
from utils.evaluation.weight_files import WEIGHT_FILES, missing

LPIPS_NETS = {"vgg": "vgg", "alex": "alexnet"}  # the package's names of networks -> weight_files' names


@dataclass
class Loaded:
    """A model in eval mode, where its weights came from, and their hash."""

    model: Any  # VQAutoEncoder or Sampler
    path: str
    hash: str


def find_weights(name: str, folder: str, step: int, raw: bool = False) -> tuple[dict[str, Tensor], str]:
    """(state dict, path) of the averaged weights <name>_ema_<step>.th if they exist and unless `raw`, else of
    <name>_<step>.th."""
    store = checkpoints_of(folder)
    if step is None:
        raise UserError(f"{store.models} holds no complete checkpoint of '{name}'")
    chosen = f"{name}_ema" if not raw and store.has(f"{name}_ema", step) else name
    path = str(store.path(chosen, step))
    return named(store.load(chosen, step), path), path


def named(state: Any, path: str) -> dict[str, Tensor]:
    """Return `state` if it is a dict with names as keys. Raises DamagedFile otherwise."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise DamagedFile(f"{path} holds no state dict, but a {type(state).__name__} of something else")
    return state


def recorded_autoencoder(store: Checkpoints, step: int) -> dict[str, str] | None:
    """The autoencoder that the manifest of a sampler's checkpoint names: dict(path, hash). None if it names
    none, as in a published folder."""
    return store.manifest(step).get("autoencoder") if store.manifest_path(step).is_file() else None


def load_autoencoder(
    H: SimpleNamespace, device: torch.device, sampler: tuple[Checkpoints, int] | None = None
) -> Loaded:
    """The VQGAN's autoencoder of --ae_load_dir, --ae_load_step.

    sampler: (Checkpoints, step) of the sampler that uses it: the weights are those that it was trained with, averaged
    or raw. None: there is no sampler, and --weights decides. The discriminator and `perceptual.*` of a checkpoint are
    ignored.
    """
    raw = H.weights == "raw"
    if sampler is not None:
        known = recorded_autoencoder(*sampler)
        raw = known is not None and Path(known["path"]).name == f"vqgan_{H.ae_load_step}.th"
    state, path = find_weights("vqgan", H.ae_load_dir, H.ae_load_step, raw)
    state = {k.removeprefix("ae."): v for k, v in state.items() if k.startswith("ae.")}
    model = build_autoencoder(H)
    load_into(model, state, path)
    return Loaded(freeze(model, device), path, hash_tensors(state))


def load_sampler(H: SimpleNamespace, device: torch.device) -> Loaded:
    """The sampler of --load_dir, --load_step."""
    state, path = find_weights(H.sampler, H.load_dir, H.load_step, H.weights == "raw")
    model = build_sampler(H)
    load_into(model, state, path)
    return Loaded(freeze(model, device), path, hash_tensors(state))


def freeze(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------- LPIPS


def load_lpips(
    net: str, weights_path: str | None = None, checkpoint: str | None = None, otherwise: str = ""
) -> nn.Module:
    """LPIPS (Zhang et al. 2018) with VGG16 ('vgg') or AlexNet ('alex'), frozen. Nothing is downloaded.

    weights_path: torchvision's state dict of that network, or a state dict of the complete LPIPS or VQGAN
    (`perceptual.*`); default: torchvision's own location. checkpoint: the path of a VQGAN checkpoint
    that will be loaded: if it holds `perceptual.*`, no other file is needed. Raises UserError if the
    weights are missing (`otherwise`: another remedy, for the message) or do not fit.
    """
    path = weights_path or WEIGHT_FILES[LPIPS_NETS[net]].place
    if not weights_path and (line := missing(LPIPS_NETS[net])):
        if checkpoint is None or not os.path.isfile(checkpoint) or not has_perceptual(checkpoint):
            raise UserError(line + otherwise)
        path = checkpoint
    state = named(load_tensors(path), path)
    import lpips

    with warnings.catch_warnings():  # lpips uses an outdated interface of torchvision
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    load_into(model, to_lpips_names(state, model), path)
    return model.eval().requires_grad_(False)


def has_perceptual(path: str) -> bool:
    return any(k.startswith("perceptual.net.") for k in named(load_tensors(path), path))


def to_lpips_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A VGG16, AlexNet, LPIPS or VQGAN state dict -> LPIPS's names; lpips's own linear heads fill what is missing."""
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
    """--dry_run: one line for each file of weights that the command line H needs and that is missing. names: those of
    weight_files."""
    for name in names:
        if line := missing(name, getattr(H, WEIGHT_FILES[name].flag)):
            say(f"note: {line}")
