"""The one place that loads weights for use: autoencoder, sampler, LPIPS."""

import os
from dataclasses import dataclass

import torch

from models.autoencoder import VQAutoEncoder
from models.samplers import build_sampler
from utils.checkpoint import checkpoints_of, load_into
from utils.errors import UserError
from utils.io import hash_tensors, load_tensors

VGG_FILE = "vgg16-397923af.pth"


@dataclass
class Loaded:
    """A model in eval mode, where its weights came from, and their hash."""

    model: torch.nn.Module
    path: str
    hash: str


def find_weights(name, folder, step):
    """(state dict, path) of the averaged weights <name>_ema_<step>.th where they are, else <name>_<step>.th."""
    store = checkpoints_of(folder)
    chosen = f"{name}_ema" if store.path(f"{name}_ema", step).is_file() else name
    return store.load(chosen, step), str(store.path(chosen, step))


def load_autoencoder(H, device):
    """The VQGAN's autoencoder of --ae_load_dir, --ae_load_step -> Loaded.

    A checkpoint's discriminator and `perceptual.*` are passed over, present or absent.
    """
    state, path = find_weights("vqgan", H.ae_load_dir, H.ae_load_step)
    state = {k.removeprefix("ae."): v for k, v in state.items() if k.startswith("ae.")}
    model = VQAutoEncoder(H)
    load_into(model, state, path)
    return Loaded(freeze(model, device), path, hash_tensors(state))


def load_sampler(H, device):
    """The sampler of --load_dir, --load_step -> Loaded."""
    state, path = find_weights(H.sampler, H.load_dir, H.load_step)
    model = build_sampler(H)
    load_into(model, state, path)
    return Loaded(freeze(model, device), path, hash_tensors(state))


def freeze(model, device):
    return model.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------- LPIPS


def vgg_place():
    """Where torchvision keeps the VGG16 weights."""
    return os.path.join(torch.hub.get_dir(), "checkpoints", VGG_FILE)


def load_perceptual(weights_path=None, checkpoint=None):
    """LPIPS with VGG16 (Zhang et al. 2018), frozen.

    weights_path: torchvision's VGG16 state dict, or a state dict of the whole LPIPS or VQGAN
    (`perceptual.*`); default: torchvision's own place. checkpoint: the path of a VQGAN checkpoint
    that is about to be loaded: when it holds `perceptual.*`, no other file is needed.
    """
    if not (weights_path or os.path.isfile(vgg_place())):
        if checkpoint is not None and os.path.isfile(checkpoint) and has_perceptual(checkpoint):
            weights_path = checkpoint
        else:
            raise UserError(
                f"the VGG16 weights for LPIPS are missing: put torchvision's {VGG_FILE} at {vgg_place()}, "
                "or name the file with --perceptual_weights PATH, or train without with --perceptual_weight 0"
            )
    import lpips

    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    path = weights_path or vgg_place()
    load_into(model, to_lpips_names(load_tensors(path), model), path)
    return model.eval().requires_grad_(False)


def has_perceptual(path):
    return any(k.startswith("perceptual.net.") for k in load_tensors(path))


def to_lpips_names(state, model):
    """A VGG16, LPIPS or VQGAN state dict -> LPIPS's names; lpips's own linear heads fill what is missing."""
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
