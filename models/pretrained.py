"""Loads trained models: from the folders of runs, published ones or runs of this program, and from exported folders.
An example:

    model = load_pretrained("logs/NAME")
    images = model.sample(8)
    model.save("FOLDER")

In the folder models/, only this file reads runs. Shapes: B images, C channels, L = h w codes.
"""

import hashlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hparams.checks import check_sampling, derive
from hparams.config import ALL_FLAGS, OF_SAMPLING, names_of
from hparams.sources import checked, preset_values, run_folder, saved_config
from models import editing
from models.build import build_autoencoder, build_sampler
from models.judging import negative_log_likelihood
from models.samplers import SAMPLERS, Sampler
from utils.core.checkpoint import Checkpoints, checkpoints_of, load_into
from utils.core.device import pick_device
from utils.core.errors import DamagedFile, UserError
from utils.core.exported import AUTOENCODER, JSON, SAMPLER, is_exported, load_exported, save_exported
from utils.core.files import hash_tensors
from utils.core.job import LOGS, ROOT
from utils.core.seed import derive_seed, sample_uniforms
from utils.data.decoding import pixels_of, upright
from utils.data.masks import fitted_mask, scaled_mask, white_mask
from utils.data.pixels import to_float, to_uint8

FLAGS = {flag.name: flag for flag in ALL_FLAGS}
SHORT = dict(steps="sample_steps", order="sample_order", schedule="sample_schedule")  # names of settings of sampling
KEPT = ("dataset", "batch_size")  # flags that an exported model has besides those that its networks depend on
Images = Tensor | Image.Image | Sequence[Image.Image]


def load_pretrained(
    name: str | Path,
    autoencoder: str | Path | None = None,
    step: int | None = None,
    device: str | torch.device | None = None,
) -> "Pretrained":
    """Load the models of a run, or exported models. The run of a sampler gives the sampler and the autoencoder of its
    training. The run of a VQGAN gives only the autoencoder. Averaged weights are loaded if the run has averaged
    weights.

    name: the folder of the run, "logs/NAME" or "NAME", both under logs/, or an absolute path; or a folder that
    `Pretrained.save` or experiments/export.py has written, which needs neither autoencoder nor step.
    autoencoder: the folder of the VQGAN. This argument is needed for a published sampler, and if the folder of the
    VQGAN was renamed. step: the step of the checkpoint; by default the newest one. device: by default a GPU if there
    is one.

    Raises FileNotFoundError if a folder or the checkpoint does not exist. Raises ValueError if files are damaged or do
    not belong together.
    """
    device = pick_device("auto") if device is None else torch.device(device)
    for folder in (Path(name).expanduser(), ROOT / name, LOGS / name):
        if is_exported(folder):
            if autoencoder is not None or step is not None:
                raise ValueError(f"{folder} is an exported model: leave autoencoder= and step= out")
            return load_folder(folder, device)
    run = find_run(name, (*SAMPLERS, "vqgan"), step)
    if run.kind != "vqgan":
        ae_run, ae = find_autoencoder(run, autoencoder, device)
        taken = {k: v for k, v in ae_run.saved.items() if k in names_of("autoencoder")}
        H = configuration(taken | run.saved, sampler=run.kind)
        require_same_codes(H, configuration(ae_run.saved), run, ae_run)
        return Pretrained(H, ae, sampler_of(H, *find_weights(run.kind, run.name, run.step), device), device)
    if autoencoder is not None:
        raise ValueError(f"{run.folder} holds a VQGAN, which is an autoencoder: leave autoencoder= out (--ae_load_dir)")
    H = configuration(run.saved)
    return Pretrained(H, autoencoder_of(H, *find_weights("vqgan", run.name, run.step), device), None, device)


class Pretrained:
    """Holds an autoencoder and a sampler, or an autoencoder alone. All results are on the CPU.

    Images that a method takes are a tensor (B, C, H, W), uint8 or floats in [0, 1], or a PIL image, or a list of PIL
    images. PIL images have any size and mode: they are resized and cropped as training images are.

    Attributes: autoencoder (models.autoencoder.VQAutoEncoder), sampler (models.samplers.Sampler or None), H (the
    configuration of the training), device, card (texts that describe an exported model).
    """

    def __init__(
        self,
        H: SimpleNamespace,
        autoencoder: "Loaded",
        sampler: "Loaded | None",
        device: torch.device,
        card: dict[str, str] | None = None,
    ):
        self.H, self.device, self.card = H, device, card or {}
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
        order="halton", schedule="cosine", and other flags of sampling by name, such as top_k=9; by default those of the
        run. Each image depends only on its number and on these arguments.
        """
        sampler = self._sampler_for(dict(settings, steps=steps))
        if n < 1 or temp <= 0:
            raise ValueError(f"n={n}, temp={temp}: n must be 1 or more, and temp above 0")

        def draw(numbers: range) -> Tensor:
            return sample_uniforms(seed, numbers, sampler.draws_per_sample(), self.device)

        batches = sampler.sample_many(draw, n, min(n, self.H.batch_size), temp)
        return torch.cat([self._decode(ids) for ids in batches])

    @torch.no_grad()
    def edit(
        self,
        images: Images,
        mask: Images,
        seed: int = 0,
        temp: float = 1.0,
        steps: int | None = None,
        variants: int = 1,
        dilate: int = 0,
        blend: int | None = None,
        **settings: int | float | str,
    ) -> Tensor:
        """Redraw a part of B images, given the rest: uint8 (B * variants, C, H, W), image after image. The results
        equal those of experiments/edit_images.py with the same settings.

        mask: what is redrawn, bool (H, W) or (B, H, W); or PIL images in the proportions of the images, one for all or
        one for each, whose white and transparent pixels are redrawn. A code is redrawn if the mask touches its cell.
        dilate: redraw this many cells around the mask, too. blend: paste the kept pixels back, with a soft edge of this
        width in pixels; None: do not, so that all pixels are those of the decoder. temp, steps, settings: as for
        `sample`. A result depends only on its image and mask, its variant and the other arguments.
        """
        sampler, H = self._sampler_for(dict(settings, steps=steps)), self.H
        if variants < 1 or temp <= 0 or dilate < 0 or (blend is not None and blend < 0):
            raise ValueError(
                f"variants={variants}, temp={temp}, dilate={dilate}, blend={blend}: variants must be 1 or more, temp "
                "above 0, the others 0 or more"
            )
        pictures = self._tensor(images)
        pictures = (pictures if pictures.dtype == torch.uint8 else to_uint8(pictures)).cpu()
        masks = self._masks(mask, images, len(pictures))
        ids = self.encode(editing.hide(to_float(pictures), masks))
        cells = editing.touched_cells(masks, tuple(H.latent_shape[1:]), dilate)
        seeds = [derive_seed("edit", seed, hashlib.sha256(x.numpy().tobytes()).hexdigest()) for x in pictures]
        uniforms = torch.cat([sample_uniforms(s, range(variants), sampler.draws_per_sample()) for s in seeds])
        ids, cells, pictures, masks = (x.repeat_interleave(variants, 0) for x in (ids, cells, pictures, masks))
        batches = zip(*(x.to(self.device).split(H.batch_size) for x in (ids, cells, uniforms)), strict=True)
        drawn = torch.cat([self._decode(editing.redraw(sampler, i, c, u, temp)) for i, c, u in batches])
        if blend is None:
            return drawn
        return to_uint8(editing.blend(to_float(pictures), to_float(drawn), masks, blend))

    @torch.no_grad()
    def log_likelihood(self, images: Images, passes: int = 16, seed: int = 0, repeats: int = 1) -> Tensor:
        """Estimate how likely the sampler finds the codes of each image: (B,) float64 in nats per image.

        For an absorbing sampler, this is an unbiased estimate of the variational lower bound on log p(codes), the mean
        of `repeats` estimates in `passes` passes of the network each. For an autoregressive sampler it is log p(codes)
        itself, and passes, seed and repeats have no effect. It says nothing about the pixels that the codes lose. With
        L codes, -log_likelihood / (L log 2) is the number of bits per code, that of experiments/judge_images.py.
        """
        sampler = self._sampler_for({})
        if passes < 1 or repeats < 1:
            raise ValueError(f"passes={passes}, repeats={repeats}: both must be 1 or more")
        ids = self.encode(images).to(self.device)
        return -negative_log_likelihood(sampler, ids, seed, passes, repeats, self.H.batch_size).mean(1)

    def save(self, path: str | Path, card: dict[str, str] | None = None) -> None:
        """Write the models as one folder of safetensors and JSON (utils/core/exported.py), which load_pretrained reads.

        card: texts for model.json, such as dict(license="CC BY-SA 4.0"); by default those of the model. Raises
        ValueError if the folder holds other files.
        """
        card = self.card if card is None else card
        if not all(isinstance(text, str) for item in card.items() for text in item):
            raise ValueError(f"card={card}: a dict of texts is needed")
        states, roles = {AUTOENCODER: self.autoencoder.state_dict()}, ["autoencoder"]
        if self.sampler is not None:
            states[SAMPLER] = self.sampler.state_dict()
            roles += ["sampler", "sampling"]
        values = {name: getattr(self.H, name) for name in (*names_of(*roles), *KEPT)}
        hparams = {name: value for name, value in values.items() if value is not None}
        origin = [Path(*Path(path).parts[-3:]).as_posix() for path in self.paths]
        save_exported(path, states, dict(hparams=hparams, origin=origin, card=card))

    @torch.no_grad()
    def encode(self, images: Images) -> Tensor:
        """Encode images -> codes, int64 (B, L), row by row."""
        parts = (part.to(self.device) for part in self._tensor(images).split(self.H.batch_size))
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

    def _tensor(self, images: Images) -> Tensor:
        """Return images as a tensor (B, C, H, W), uint8 or floats in [0, 1]."""
        H, shape = self.H, (self.H.n_channels, self.H.img_size, self.H.img_size)
        if not isinstance(images, Tensor):
            pictures = pil_images(images, "images")
            return torch.stack([pixels_of(upright(picture), H.img_size, H.n_channels) for picture in pictures])
        if images.ndim != 4 or images.shape[1:] != shape or not len(images):
            raise ValueError(f"images of shape {tuple(images.shape)}: (B, {', '.join(map(str, shape))}) is needed")
        if images.dtype != torch.uint8 and not (images.is_floating_point() and 0 <= images.min() <= images.max() <= 1):
            raise ValueError(f"images of {images.dtype}: uint8, or floats in [0, 1], are needed")
        return images

    def _masks(self, mask: Images, images: Images, n: int) -> Tensor:
        """Return the masks of n images, bool (n, H, W) on the CPU."""
        size = self.H.img_size
        if not isinstance(mask, Tensor):
            masks, sizes = pil_images(mask, "mask"), [(size, size)] * n
            if not isinstance(images, Tensor):
                sizes = [upright(picture).size for picture in pil_images(images, "images")]
            if len(masks) not in (1, n):
                raise ValueError(f"{len(masks)} masks for {n} images: give one, or one for each image")
            whites = [white_mask(upright(one)) for one in masks] * (n // len(masks))
            mask = torch.stack([fitted_mask(scaled_mask(m, s), size) for m, s in zip(whites, sizes, strict=True)])
        if mask.dtype != torch.bool or mask.shape not in ((size, size), (n, size, size)):
            raise ValueError(
                f"mask of {mask.dtype}, shape {tuple(mask.shape)}: bool ({size}, {size}) or ({n}, {size}, {size}) is "
                "needed"
            )
        if not mask.flatten(-2).any(-1).all():
            raise ValueError("a mask marks no pixel: True is what to redraw")
        return mask.cpu().expand(n, -1, -1)

    def _sampler_for(self, given: dict[str, Any]) -> Sampler:
        """Return the sampler with settings by their names or short names; None: that of the run. All such samplers
        share the tensors."""
        if self.sampler is None:
            raise ValueError(f"{self.paths[0]} is an autoencoder, which draws no samples: load the run of a sampler")
        known = set(inspect.signature(type(self.sampler)).parameters) & set(OF_SAMPLING)
        given = {name: value for name, value in given.items() if value is not None}
        settings = {SHORT.get(name, name): value for name, value in given.items()}
        if len(settings) < len(given):
            raise ValueError(f"{', '.join(given)}: only one of these can be given")
        if "sample_steps" in settings and "sample_steps" not in known:
            steps = settings["sample_steps"]
            raise ValueError(f"steps={steps}: {self.paths[0]} draws one code after the other: leave steps out")
        for name, value in settings.items():
            if name not in known:
                short = {long: name for name, long in SHORT.items()}
                there = ", ".join(sorted(short.get(other, other) for other in known)) or "none"
                raise ValueError(f"{name} is no setting of sampling of {self.paths[0]}; there are: {there}")
            checked(FLAGS[name], value)
        if not settings:
            return self.sampler
        H = SimpleNamespace(**{**vars(self.H), **settings})
        check_sampling(H, settings)
        return with_settings(self.sampler, H, self.device)


def pil_images(images: Any, what: str) -> list[Image.Image]:
    """Return a PIL image or a sequence of PIL images as a list. Raises ValueError for anything else."""
    found = list(images) if isinstance(images, list | tuple) else [images]
    if not found or not all(isinstance(image, Image.Image) for image in found):
        kind = type(next((image for image in found if not isinstance(image, Image.Image)), images)).__name__
        raise ValueError(f"{what} of {kind}: a tensor, a PIL image or a list of PIL images is needed")
    return found


# ---------------------------------------------------------------------- exported models


def load_folder(folder: Path, device: torch.device) -> Pretrained:
    """Load an exported model. Raises DamagedFile if the folder does not hold what was written."""
    record, states = load_exported(folder)
    try:
        H = configuration({k: checked(FLAGS[k], v) for k, v in record["hparams"].items() if k in FLAGS})
    except UserError as error:
        raise DamagedFile(f"{folder / JSON} is damaged: {error}") from None
    ae = loaded(build_autoencoder(H), states[AUTOENCODER], str(folder / AUTOENCODER), device)
    sampler = sampler_of(H, states[SAMPLER], str(folder / SAMPLER), device) if SAMPLER in states else None
    return Pretrained(H, ae, sampler, device, record["card"])


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
    older = {name: flag.older(saved) for name, flag in FLAGS.items()}
    H = SimpleNamespace(**older | preset_values("churches", "sampler") | saved | more)
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
                f"{run.folder} does not record its autoencoder: pass autoencoder='logs/NAME' (in commands: "
                "--ae_load_dir NAME), the folder of the VQGAN that it was trained with"
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
