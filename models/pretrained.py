"""Loads trained models from the folders of runs. The runs are published ones, or runs of this program. An example:

    model = load_pretrained("logs/NAME")
    images = model.sample(8)

In the folder models/, only this file reads runs. Shapes: B images, C channels, L = h w codes.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hparams.checks import check_sampling, derive
from hparams.config import ALL_FLAGS, OF_SAMPLING, names_of
from hparams.sources import checked, run_folder, saved_config
from models.build import build_autoencoder, build_sampler
from models.samplers import SAMPLERS, Sampler
from utils.core.checkpoint import Checkpoints, checkpoints_of, load_into
from utils.core.device import pick_device
from utils.core.errors import DamagedFile, UserError
from utils.core.files import hash_tensors
from utils.core.job import LOGS
from utils.core.seed import sample_uniforms
from utils.data.pixels import to_float, to_uint8

FLAGS = {flag.name: flag for flag in ALL_FLAGS}


def load_pretrained(
    name: str | Path,
    autoencoder: str | Path | None = None,
    step: int | None = None,
    device: str | torch.device | None = None,
) -> "Pretrained":
    """Load the models of a run. The run of a sampler gives the sampler and the autoencoder of its training. The run of
    a VQGAN gives only the autoencoder. Averaged weights are loaded if the run has averaged weights.

    name: the folder of the run, "logs/NAME" or "NAME", both under logs/, or an absolute path. autoencoder: the folder
    of the VQGAN. This argument is needed for a published sampler, and if the folder of the VQGAN was renamed.
    step: the step of the checkpoint; by default the newest one. device: by default a GPU if there is one.

    Raises FileNotFoundError if a folder or the checkpoint does not exist. Raises ValueError if files are damaged or do
    not belong together.
    """
    device = pick_device("auto") if device is None else torch.device(device)
    run = find_run(name, (*SAMPLERS, "vqgan"), step)
    if run.kind != "vqgan":
        ae_run, ae = find_autoencoder(run, autoencoder, device)
        taken = {k: v for k, v in ae_run.saved.items() if k in names_of("autoencoder")}
        H = configuration(taken | run.saved, sampler=run.kind)
        require_same_codes(H, configuration(ae_run.saved), run, ae_run)
        return Pretrained(H, ae, sampler_of(H, *find_weights(run.kind, run.name, run.step), device), device)
    if autoencoder is not None:
        raise ValueError(f"{run.folder} holds a VQGAN, which is an autoencoder: leave autoencoder= out")
    H = configuration(run.saved)
    return Pretrained(H, autoencoder_of(H, *find_weights("vqgan", run.name, run.step), device), None, device)


class Pretrained:
    """Holds an autoencoder and a sampler, or an autoencoder alone. All results are on the CPU.

    Attributes: autoencoder (models.autoencoder.VQAutoEncoder), sampler (models.samplers.Sampler or None), H (the
    configuration of the training), device.
    """

    def __init__(self, H: SimpleNamespace, autoencoder: "Loaded", sampler: "Loaded | None", device: torch.device):
        self.H, self.device = H, device
        self.autoencoder = autoencoder.model
        self.sampler: Sampler | None = None if sampler is None else sampler.model
        self.paths = [loaded.path for loaded in (sampler, autoencoder) if loaded is not None]

    def __repr__(self) -> str:
        _, h, w = self.H.latent_shape
        return (
            f"<{' with '.join(self.paths)}: images of {self.H.img_size} x {self.H.img_size} pixels, {h} x {w} codes of "
            f"{self.H.codebook_size}>"
        )

    @torch.no_grad()
    def sample(
        self, n: int, seed: int = 0, temp: float = 1.0, steps: int | None = None, **settings: int | float | str
    ) -> Tensor:
        """Draw n images, uint8 (n, C, H, W). They equal the first n images of experiments/get_samples.py with the same
        settings.

        temp: the temperature. steps: sampling steps of the absorbing diffusion; by default those of the run. settings:
        other flags of sampling by name, such as sample_order="halton"; by default those of the run. Each image depends
        only on its number and on these arguments.
        """
        sampler = self._sampler_for(steps, settings)
        if n < 1 or temp <= 0:
            raise ValueError(f"n={n}, temp={temp}: n must be 1 or more, and temp above 0")

        def draw(numbers: range) -> Tensor:
            return sample_uniforms(seed, numbers, sampler.draws_per_sample(), self.device)

        batches = sampler.sample_many(draw, n, min(n, self.H.batch_size), temp)
        return torch.cat([self._decode(ids) for ids in batches])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W), uint8 or floats in [0, 1] -> codes, int64 (B, L), row by row."""
        H, shape = self.H, (self.H.n_channels, self.H.img_size, self.H.img_size)
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"images of shape {tuple(images.shape)}: (B, {', '.join(map(str, shape))}) is needed")
        if images.dtype != torch.uint8 and not (images.is_floating_point() and 0 <= images.min() <= images.max() <= 1):
            raise ValueError(f"images of {images.dtype}: uint8, or floats in [0, 1], are needed")
        parts = (part.to(self.device) for part in images.split(H.batch_size))
        xs = (to_float(part) if part.dtype == torch.uint8 else part.float() for part in parts)
        return torch.cat([encode_batch(self.autoencoder, x).cpu() for x in xs])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Decode codes (B, L) or (B, h, w) -> images, uint8 (B, C, H, W)."""
        H = self.H
        if ids.is_floating_point() or ids.ndim < 2 or ids.shape[1:].numel() != H.latent_shape[1] * H.latent_shape[2]:
            _, h, w = H.latent_shape
            raise ValueError(f"codes of {ids.dtype}, shape {tuple(ids.shape)}: integers (B, {h * w}) are needed")
        if ids.numel() and not 0 <= ids.min() <= ids.max() < H.codebook_size:
            raise ValueError(f"codes must be in 0 ... {H.codebook_size - 1}")
        return torch.cat([self._decode(part) for part in ids.flatten(1).long().split(H.batch_size)])

    def _decode(self, ids: Tensor) -> Tensor:
        return to_uint8(self.autoencoder.decode(ids.to(self.device), *self.H.latent_shape[1:])).cpu()

    def _sampler_for(self, steps: int | None, settings: dict[str, Any]) -> Sampler:
        """Return the sampler with these settings. All such samplers share the tensors."""
        if self.sampler is None:
            raise ValueError(f"{self.paths[0]} is an autoencoder, which draws no samples: load the run of a sampler")
        known = set(inspect.signature(type(self.sampler)).parameters) & set(OF_SAMPLING)
        if steps is not None:
            if "sample_steps" not in known:
                raise ValueError(f"steps={steps}: {self.paths[0]} draws one code after the other: leave steps out")
            if steps < 1:
                raise ValueError(f"steps={steps}: it must be 1 or more")
            settings = settings | dict(sample_steps=steps)
        for name, value in settings.items():
            if name not in known:
                there = ", ".join(sorted(known - {"sample_steps"})) or "none"
                raise ValueError(f"{name} is no setting of sampling of {self.paths[0]}; there are: {there}")
            checked(FLAGS[name], value)
        if not settings:
            return self.sampler
        H = SimpleNamespace(**{**vars(self.H), **settings})
        check_sampling(H, settings)
        return with_settings(self.sampler, H, self.device)


# ---------------------------------------------------------------------- runs


@dataclass
class FoundRun:
    """The checkpoint of a run. name: the folder of the run, relative to logs/ or absolute. kind: 'vqgan' or a sampler's
    name. saved: the configuration that the run recorded; {} if the run is a published checkpoint."""

    name: str
    kind: str
    step: int
    saved: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.store.folder

    @property
    def store(self) -> Checkpoints:
        return checkpoints_of(self.name)


def find_run(name: str | Path, kinds: tuple[str, ...], step: int | None = None) -> FoundRun:
    """Find the run in a folder. The kinds are tried in order, and the first kind in the folder is taken. If step is
    None, the newest complete step is taken."""
    path = Path(name).expanduser()
    if not path.is_absolute():
        below = path.parts[1:] if len(path.parts) > 1 and path.parts[0] == LOGS.name else path.parts
        path = run_folder(str(Path(*below))).relative_to(LOGS)
    store = checkpoints_of(str(path))
    if not store.folder.is_dir():
        raise FileNotFoundError(f"there is no folder {store.folder}")
    for kind in kinds:
        steps = store.steps_of_model(kind)
        if steps:
            chosen = next(store.complete_steps(kind), steps[-1]) if step is None else step
            if chosen not in steps:
                there = ", ".join(map(str, steps[-20:]))
                raise FileNotFoundError(f"{store.models} holds no step {chosen} of '{kind}': there are {there}")
            return FoundRun(str(path), kind, chosen, recorded_config(store, chosen))
    raise FileNotFoundError(f"{store.models} holds no weights of {' or '.join(kinds)}")


def recorded_config(store: Checkpoints, step: int) -> dict[str, Any]:
    """Return {flag: value} as a run recorded it with a step; {} if the run is a published checkpoint."""
    saved = saved_config(store.folder, FLAGS, step) or {}
    return {k: v for k, v in saved.items() if k in FLAGS}


def configuration(saved: dict[str, Any], **more: Any) -> SimpleNamespace:
    """Return a value for each flag. The value is the recorded one of a run, or else the value of the paper."""
    H = SimpleNamespace(**{name: flag.older(saved) for name, flag in FLAGS.items()} | saved | more)
    H.explicit = list(saved)
    derive(H, FLAGS.values())
    return H


def find_autoencoder(run: FoundRun, folder: str | Path | None, device: torch.device) -> tuple[FoundRun, "Loaded"]:
    """Load the autoencoder of a sampler. The manifest of the sampler's run records which weights these are.

    folder: the present folder of the weights; None: the recorded folder.
    """
    known = recorded_autoencoder(run.store, run.step)
    if folder is None:
        folder = run.saved.get("ae_load_dir")
        if folder is None:
            raise ValueError(
                f"{run.folder} does not record its autoencoder: pass autoencoder='logs/NAME', the folder of the VQGAN "
                "that it was trained with"
            )
        run_folder(folder)  # someone else may have written the file, so names that lead out of logs/ are refused
        beside = [parent / folder for parent in Path(run.name).parents if Path(run.name).is_absolute()]
        folder = next((path for path in beside if path.is_dir()), folder)
    weights, step = named_weights(known) or ("", run.saved.get("ae_load_step"))
    ae_run = find_run(folder, ("vqgan",), step)
    state, path = find_weights("vqgan", ae_run.name, ae_run.step, raw=weights == "vqgan")
    loaded = autoencoder_of(configuration(ae_run.saved), state, path, device)
    if known and known["hash"] != loaded.hash:
        raise ValueError(f"{run.folder} was trained on the codes of {known['path']}, which is not this {path}")
    return ae_run, loaded


def require_same_codes(H: SimpleNamespace, ae_H: SimpleNamespace, run: FoundRun, ae_run: FoundRun) -> None:
    for name in ("codebook_size", "latent_shape"):
        if getattr(H, name) != getattr(ae_H, name):
            raise ValueError(
                f"{run.folder} and {ae_run.folder} do not belong together: {name} {getattr(H, name)} and "
                f"{getattr(ae_H, name)}"
            )


# ---------------------------------------------------------------------- weights


@dataclass
class Loaded:
    """A model in eval mode, with the path and the hash of its weights."""

    model: Any  # VQAutoEncoder or Sampler
    path: str
    hash: str


def find_weights(name: str, folder: str, step: int, raw: bool = False) -> tuple[dict[str, Tensor], str]:
    """Return (state dict, path) of weights. The averaged weights <name>_ema_<step>.th are taken if they exist and `raw`
    is False. Otherwise <name>_<step>.th is taken."""
    store = checkpoints_of(folder)
    if step is None:
        raise UserError(f"{store.models} holds no complete checkpoint of '{name}'")
    chosen = f"{name}_ema" if not raw and store.has(f"{name}_ema", step) else name
    path = str(store.path(chosen, step))
    return named(store.load(chosen, step), path), path


def recorded_autoencoder(store: Checkpoints, step: int) -> dict[str, str] | None:
    """Return dict(path, hash) of the autoencoder that the manifest of a sampler's checkpoint names. Return None if
    there is no such name. A published folder has no manifest, for example."""
    return store.manifest(step).get("autoencoder") if store.manifest_path(step).is_file() else None


def named_weights(autoencoder: dict[str, str] | None) -> tuple[str, int] | None:
    """Return ('vqgan' or 'vqgan_ema', step) of an autoencoder from `recorded_autoencoder`; None if there is no name."""
    match = re.fullmatch(r"(vqgan(?:_ema)?)_(\d+)\.th", Path(autoencoder["path"]).name) if autoencoder else None
    return (match[1], int(match[2])) if match else None


def named(state: Any, path: str) -> dict[str, Tensor]:
    """Return `state` if it is a dict with names as keys. Raises DamagedFile otherwise."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise DamagedFile(f"{path} holds no state dict, but a {type(state).__name__} of something else")
    return state


def autoencoder_of(H: SimpleNamespace, state: dict[str, Tensor], path: str, device: torch.device) -> Loaded:
    """Build the autoencoder from a VQGAN's state dict. The discriminator and `perceptual.*` are ignored."""
    state = {k.removeprefix("ae."): v for k, v in state.items() if k.startswith("ae.")}
    return loaded(build_autoencoder(H), state, path, device)


def sampler_of(H: SimpleNamespace, state: dict[str, Tensor], path: str, device: torch.device) -> Loaded:
    """Build the sampler from a state dict."""
    return loaded(build_sampler(H), state, path, device)


def loaded(model: nn.Module, state: dict[str, Tensor], path: str, device: torch.device) -> Loaded:
    """Load a state dict into a model. Raises UserError if a weight is not a finite number: the model would draw or find
    the same code everywhere."""
    load_into(model, state, path)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{path}: the weights '{name}' are not finite numbers: use the checkpoint of another step")
    return Loaded(freeze(model, device), path, hash_tensors(state))


def with_settings(sampler: Sampler, H: SimpleNamespace, device: torch.device) -> Sampler:
    """Build the sampler with the flags of sampling of another configuration H. Both samplers share the tensors."""
    other = build_sampler(H)
    other.load_state_dict(sampler.state_dict(), assign=True)
    return freeze(other, device)


def freeze(model: nn.Module, device: torch.device) -> Any:
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode_batch(ae: Any, x: Tensor, precision: Any = None) -> Tensor:
    """Encode images, floats in [0, 1], (B, C, H, W) -> ids (B, L) int64.

    precision: a utils.training.amp.Precision; default: float32. The TF32 of GPUs is switched off, because its three
    digits would change the nearest codes.
    """
    precise = torch.autocast(x.device.type, enabled=False)
    with precision.autocast() if precision else precise, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return ae.encode(x)
