"""Declares every flag of both stages with its name, type, default, help and role. The role of a flag determines all
other properties of the flag. Do not rename flags. The file of a quantizer or sampler declares its own flags.

A default of None means that the value is derived (see hparams/resolve.py) or not used. The help text of the flag says
more.
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from hparams.presets import PAPER_LEVELS, PRESETS

Values = Mapping[str, Any]  # the type of a dictionary {flag: value}
MODELS = Path(__file__).resolve().parents[1] / "models"
# The roles of flags. A flag has one or several, separated by spaces.
ROLES = {
    "autoencoder": "tensors of the autoencoder depend on it: a loaded checkpoint decides",
    "discriminator": "tensors of the VQGAN's discriminator depend on it: a loaded checkpoint decides",
    "sampler": "tensors of the sampler depend on it: a loaded checkpoint decides",
    "vqgan": "training of a VQGAN reads it; other scripts ignore it",
    "training": "training reads it; scripts that measure ignore it unless they state otherwise",
    "sampling": "samples depend on it: caches of samples have it in their keys, the commands after stage 2 repeat it",
    "keyed": "the key of every cache of samples has it; other flags of sampling are newer than some of these caches",
    "images": "the images of training depend on it: a script that measures takes it from the run of the model",
    "stages": "stage 2 usually wants the same value: the command after stage 1 repeats it",
    "data": "the data set, or which weights are read: the command line of a resumed run may not change it",
    "origin": "the weights that a run starts from: the command line of a resumed run may not change them",
    "place": "a folder or a file: --resume does not restore it",
    "path": "a file or folder: a run records it so that it is found from another folder, too",
    "request": "what this command is to do: --resume does not restore it",
    # Someone else may have written the folder of a run. The folder must not choose the server that gets the login.
    "dashboard": "how to reach the dashboard: --resume does not restore it, printed commands repeat it",
    "machine": "it depends on the machine: printed commands repeat it",
    "ignored": "accepted for old command lines, without effect",
    "general": "nothing is derived from it",
    "advanced": "--help lists only its name, also in scripts that read it",
    "common": "--help shows it, unless the script does not read it or takes it from a checkpoint",
}
FACTS = set("min max above choices required metavar repeatable needs exclusive replaces older codes_from".split())


def opt(default: Any, help: str, role: str = "", **facts: Any) -> Any:
    """Declare a flag with its default, help text and roles.

    role: names from ROLES, separated by spaces. A flag that belongs to a single script has no role.

    The following facts are optional:

    min, max (inclusive), above (exclusive minimum), choices, required, metavar;
    repeatable: each use of the flag adds to the list;
    needs: "flag value ...": the flag has an effect only if the other flag has one of these values (without a list: any
    value but 0);
    exclusive: if True, only the default is accepted without the needed value; if False, a note is printed;
    replaces: names of flags that have no effect if this one is given;
    older: the value in a run that began before this flag existed (default: the default of the flag), or a function of
    the saved configuration of such a run;
    codes_from: the flag is the step at which the quantizer places its codes. Before this step there are no codes.
    """
    unknown = facts.keys() - FACTS | set(role.split()) - ROLES.keys()
    assert not unknown, f"unknown facts or roles of a flag: {unknown}"
    metadata = dict(facts, help=help, role=role)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def registered(folder: str) -> dict[str, dict[str, dict]]:
    """Return {name: FLAGS} for the names that the files of models/<folder> register. FLAGS is {} for a file without
    FLAGS. The function reads the source text, because importing the file would import torch."""
    result = {}
    for path in sorted((MODELS / folder).glob("*.py")):
        names, flags = [], {}
        for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
            if isinstance(node, ast.ClassDef):
                calls = [call for call in node.decorator_list if isinstance(call, ast.Call)]
                names += [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "register"]
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS":
                flags = ast.literal_eval(node.value)
        result.update(dict.fromkeys(names, flags))
    return result


QUANTIZERS, SAMPLERS, ORDERS = map(registered, ("quantizers", "samplers", "samplers/orders"))


def declared(option: str, owners: dict[str, dict[str, dict]], group: str, role: str) -> type:
    """Make a dataclass of the flags that the files of quantizers or samplers declare. --option selects one of `owners`.

    A flag has the type of its default. Unless its facts say otherwise, the flag has this role and needs its owner. The
    facts {} mean that another file declares the flag, and that this quantizer or sampler also has the flag.
    """
    result = []
    for name, facts in [item for flags in owners.values() for item in flags.items()]:
        if facts:
            default = facts["default"]
            kind: Any = list[type(default[0])] if isinstance(default, list) else type(default)  # type: ignore[misc]
            needs = " ".join([option, *(owner for owner, flags in owners.items() if name in flags)])
            result.append((name, kind, opt(**{"role": role, "needs": needs, **facts})))
    return make_dataclass(f"Declared_{option}", result, namespace=dict(__doc__=group))


@dataclass
class RunConfig:
    """run and files"""

    dataset: str = opt(None, "data set: an entry of datasets.yaml, or 'custom'", "data", required=True)
    custom_dataset_path: str = opt(
        None, "folder of images (or LMDB) for --dataset custom", "place path common", metavar="DIR"
    )
    preset: str = opt(
        None,
        f"defaults to take: {', '.join(PRESETS)} (default: those of the loaded model's run, else of the data set)",
        "stages common",
        choices=list(PRESETS),
        metavar="NAME",
    )
    log_dir: str = opt("test", "the run's folder under logs/", "place common", metavar="NAME")
    load_dir: str = opt(
        "test",
        "folder under logs/ to load a model from (see --load_step)",
        "origin common",
        metavar="NAME",
        needs="load_step",
    )
    load_step: int = opt(
        0,
        "step of --load_dir to load; 0: training starts afresh, other scripts take the newest complete step",
        "origin common",
        min=0,
    )
    load_optim: bool = opt(
        False, "with --load_step, load the optimisers' state too", "training origin", needs="load_step"
    )
    weights: str = opt(
        "ema",
        "weights of the sampler, or of the VQGAN if no sampler is loaded; ema: the averaged ones if there are any",
        "data",
        choices=["ema", "raw"],
    )
    resume: bool = opt(
        False, "continue --log_dir from its newest complete checkpoint, exactly where it was", "training request common"
    )
    seed: int = opt(0, "seed of everything random", "general common keyed", min=0, max=2**63 - 1)
    device: str = opt("auto", "where to compute", "machine common", choices=["auto", "cpu", "cuda", "mps"])
    num_workers: int = opt(
        None,
        "processes that decode images, per process of torchrun (default: in total one per core, at most 8)",
        "machine",
        min=0,
        max=1024,
    )
    cache_images: bool = opt(
        False, "keep the decoded, resized images in files under packed/, and train from those", "vqgan"
    )
    dry_run: bool = opt(
        False, "print the resolved configuration and the model's size and cost, then stop", "request common"
    )


@dataclass
class TrainConfig:
    """training"""

    train_steps: int = opt(100_000_000, "train up to and including this step", "training common", min=1)
    batch_size: int = opt(
        None,
        "images (or code sequences) per step, of all processes together (default: 3 for the VQGAN, 20 for samplers)",
        "general common",
        min=1,
        max=1_000_000,
    )
    accumulate_steps: int = opt(
        1,
        "number of parts of the batch that a process computes one after the other, to save memory; "
        "the result is the same",
        "training",
        min=1,
        max=1_000_000,
    )
    lr: float = opt(
        None,
        "learning rate (default: base_lr x batch_size for the VQGAN; samplers 2e-4, ffhq 1e-4)",
        "training common",
        above=0.0,
    )
    amp: bool = opt(False, "mixed precision", "machine common")
    amp_dtype: str = opt(
        "auto",
        "number format of --amp; auto: bf16 if the device has it, else fp16",
        "machine",
        choices=["auto", "bf16", "fp16"],
        needs="amp",
    )
    compile: str = opt(
        "auto",
        "torch.compile for the large networks; auto: on CUDA, for long trainings and many samples",
        "general",
        choices=["auto", "on", "off"],
    )
    ema: bool = opt(
        False, "keep an exponential moving average of the weights (and prefer it when loading)", "stages common"
    )
    ema_beta: float = opt(
        0.995, "decay of the moving average at each of its updates", "training", min=0.0, max=1.0, needs="ema"
    )
    steps_per_update_ema: int = opt(10, "steps between updates of the moving average", "training", min=1, needs="ema")
    ema_warmup: bool = opt(
        True,
        "limit the decay of the n-th update to (1 + n) / (10 + n), so that the average of a short run is not "
        "mostly its first weights (default: on)",
        "training",
        needs="ema",
        older=False,
    )


@dataclass
class OutputConfig:
    """logging, pictures, checkpoints, dashboard (steps between; 0: never)"""

    steps_per_log: int = opt(10, "steps between lines of stats.jsonl", "training", min=1)
    steps_per_eval: int = opt(
        0, "steps between validations; 0: none, all images of a folder are for training", "images stages common", min=0
    )
    steps_per_display_output: int = opt(5000, "steps between pictures on the dashboard", "training", min=0)
    steps_per_save_output: int = opt(
        5000, "steps between pictures saved under logs/<log_dir>/images", "training common", min=0
    )
    steps_per_checkpoint: int = opt(
        25_000, "steps between checkpoints (one is always written at the end)", "training common", min=0
    )
    keep_checkpoints: int = opt(
        0, "checkpoints of this run to keep, the newest complete ones (1 counts as 2); 0: all", "training common", min=0
    )
    save_individually: bool = opt(False, "save pictures one by one rather than as one sheet", "training")
    visdom_port: int = opt(8097, "port of the visdom server", "dashboard", min=1, max=65535)
    visdom_server: str = opt(None, "address of the visdom server (default: this machine)", "dashboard", metavar="URL")
    visdom_compare: list[str] = opt(
        None, "runs under logs/ whose curves are added to the plots", "training request", metavar="LOG_DIR"
    )
    no_visdom: bool = opt(False, "do not use a visdom server", "dashboard common", replaces=("visdom_compare",))


@dataclass
class VQGANConfig:
    """VQGAN"""

    img_size: int = opt(256, "side of the square training images in pixels", "autoencoder common", min=4, max=8192)
    n_channels: int = opt(3, "image channels: 3 (colour) or 1 (grey)", "autoencoder", choices=[1, 3])
    nf: int = opt(128, "width of the first level; a multiple of 32", "autoencoder", min=32, max=16_384)
    ch_mult: list[int] = opt(
        None,
        "width of each level as a multiple of nf; the image is halved between levels (default: by img_size, for about "
        "16 x 16 codes; 1 1 2 2 4 for 256 pixels)",
        "autoencoder common",
        min=1,
        max=1024,
        older=PAPER_LEVELS,
    )
    res_blocks: int = opt(2, "residual blocks per level", "autoencoder", min=1, max=100)
    attn_resolutions: list[int] = opt(
        None, "resolutions with attention (default: the latents' side)", "autoencoder", min=1
    )
    latent_shape: list[int] = opt(
        None, "1, height and width of the codes (default: from img_size and ch_mult)", "autoencoder sampler", min=1
    )
    emb_dim: int = opt(256, "length of a codebook vector", "autoencoder", min=1, max=65_536)
    codebook_size: int = opt(1024, "number of codes", "autoencoder sampler common", min=1, max=1_000_000)
    quantizer: str = opt("nearest", "how latents become codes", "autoencoder", choices=list(QUANTIZERS))


@dataclass
class VQGANTrainingConfig:
    """VQGAN"""

    base_lr: float = opt(4.5e-6, "learning rate per image of the batch, unless --lr", "vqgan", above=0.0)
    adam_beta2: float = opt(
        0.999,
        "decay of Adam's mean of squared gradients; 0.99 adapts faster, for runs of a few thousand steps",
        "vqgan",
        min=0.0,
        max=0.999999,
    )
    mse_weight: float = opt(
        0.0,
        "weight of the squared error, in addition to the absolute error; colours are learned earlier",
        "vqgan",
        min=0.0,
    )
    perceptual_weight: float = opt(1.0, "weight of LPIPS; 0: no VGG weights needed", "vqgan common", min=0.0)
    perceptual_net: str = opt(
        "vgg",
        "network of the perceptual loss; efficientnet_lite0 needs no download",
        "vqgan common",
        choices=["vgg", "efficientnet_lite0"],
        needs="perceptual_weight",
    )
    perceptual_weights: str = opt(
        None,
        "file with the VGG16 weights for LPIPS (default: torchvision's path)",
        "vqgan path common",
        metavar="PATH",
        needs="perceptual_weight",
    )
    ndf: int = opt(64, "width of the discriminator's first layer", "discriminator", min=1, max=16_384)
    disc_layers: int = opt(3, "layers of the discriminator", "discriminator", min=1, max=30)
    disc_start_step: int = opt(30_001, "step at which the discriminator joins", "vqgan common", min=0)
    disc_warmup_steps: int = opt(
        0,
        "steps from --disc_start_step on in which the discriminator learns, but its gradient does not count",
        "vqgan",
        min=0,
    )
    disc_ramp_steps: int = opt(
        0, "steps afterwards over which its weight grows from 0 to the adaptive weight", "vqgan", min=0
    )
    lecam_weight: float = opt(
        0.0, "weight of the discriminator's LeCam regularisation (Tseng et al. 2021)", "vqgan", min=0.0
    )
    disc_weight_max: float = opt(1.0, "upper bound of the discriminator's adaptive weight", "vqgan", min=0.0)
    diff_aug: bool = opt(False, "differentiable augmentation of the discriminator's inputs", "vqgan common")
    random_crop: float = opt(
        1.0,
        "train on random crops of at least this share of an image's area; 1: on the centre of each image",
        "vqgan",
        above=0.0,
        max=1.0,
        metavar="SCALE_MIN",
        older=1.0,
    )
    horizontal_flip: bool = opt(
        False, "mirror images: each with probability 1/2 (VQGAN), both ways cached (samplers)", "training stages common"
    )


@dataclass
class AutoencoderLoadConfig:
    """autoencoder to load"""

    ae_load_dir: str = opt(None, "folder under logs/ that holds the VQGAN", "place", required=True, metavar="NAME")
    ae_load_step: int = opt(None, "step of the VQGAN to load (default: the newest complete one)", "place common", min=0)


@dataclass
class SamplerConfig:
    """sampler"""

    sampler: str = opt(None, "prior over the codes", "sampler", required=True, choices=list(SAMPLERS))
    bert_n_emb: int = opt(512, "width of the Transformer", "sampler common", min=1, max=65_536)
    bert_n_head: int = opt(8, "attention heads; must divide bert_n_emb", "sampler keyed", min=1, max=65_536)
    bert_n_layers: int = opt(24, "layers of the Transformer", "sampler common", min=1, max=1000)
    block_size: int = opt(None, "tokens per sequence (default: from latent_shape)", "sampler", min=1)
    crops: int = opt(
        1,
        "codes of each image to train on: of its centre and of N - 1 random crops, as --random_crop of the VQGAN",
        "training",
        min=1,
        max=1000,
        metavar="N",
    )
    embd_pdrop: float = opt(0.0, "dropout of the embeddings", "training", min=0.0, max=0.999)
    attn_pdrop: float = opt(0.0, "dropout of the attention weights", "training", min=0.0, max=0.999)
    resid_pdrop: float = opt(0.0, "dropout of the residual branches", "training", min=0.0, max=0.999)
    temp: float = opt(1.0, "temperature of the codes' distribution when sampling", "sampling common keyed", min=1e-37)
    temp_end: float = opt(
        None,
        "temperature at the last step, linear from --temp on (default: --temp)",
        "sampling advanced",
        min=1e-37,
        needs="sampler absorbing",
        exclusive=True,
    )
    sample_order: str = opt(
        "random",
        f"order in which codes are revealed: {', '.join(ORDERS)}",
        "sampling",
        choices=list(ORDERS),
        metavar="NAME",
        needs="sampler absorbing",
        exclusive=True,
    )
    warmup_iters: int = opt(
        10_000, "steps over which the learning rate rises linearly to lr (ffhq: 30000)", "training common", min=0
    )
    greedy_epochs: int = opt(None, "accepted for old command lines, without effect", "ignored", min=0)
    greedy: bool = opt(False, "accepted for old command lines, without effect", "ignored")
    sample_block_size: int = opt(None, "accepted for old command lines, without effect", "ignored", min=0)


@dataclass
class RecordedConfig:
    """Settings without a flag. A run records them, so that resumed runs of earlier versions keep their behaviour."""

    codes_precision: str = opt(
        "float32",
        "number format in which stage 2 encodes the images; amp: that of --amp_dtype",
        "general",
        choices=["float32", "amp"],
        older=lambda saved: "amp" if saved.get("amp") else "float32",
    )
    unique_images: bool = opt(True, "if several paths or links lead to one file, use it once", "images", older=False)
    split_rule: str = opt(
        "hash",
        "which images validate: those with the lowest hash of their name, or the last by path",
        "images",
        choices=["hash", "last"],
        older="last",
    )


QuantizerConfig = declared("quantizer", QUANTIZERS, group="VQGAN", role="vqgan")
OneSamplerConfig = declared("sampler", SAMPLERS, group="sampler", role="training")
_VQGAN = (VQGANConfig, QuantizerConfig, VQGANTrainingConfig)


def vqgan_family() -> tuple[type, ...]:
    """Return the flags of scripts that train or load a VQGAN."""
    return RunConfig, TrainConfig, OutputConfig, *_VQGAN


def sampler_family() -> tuple[type, ...]:
    """Return the flags of scripts that train or load a sampler."""
    return RunConfig, AutoencoderLoadConfig, SamplerConfig, OneSamplerConfig, TrainConfig, OutputConfig, *_VQGAN


@dataclass(frozen=True)
class Flag:
    """One flag in the form that the parser and the checks need."""

    name: str
    type: type  # the type of one value: bool, int, float or str
    is_list: bool
    default: Any
    group: str
    meta: dict = field(hash=False)

    @property
    def roles(self) -> set[str]:
        return set(self.meta["role"].split())

    @property
    def needs(self) -> list[str]:
        """Return [another flag, values ...], or []. This flag has an effect only with one of the values."""
        return self.meta.get("needs", "").split()

    def works(self, values: Values) -> bool:
        """Say whether this flag has an effect, given the values of all flags."""
        if not self.needs:
            return True
        other, *wanted = self.needs
        return values.get(other) in wanted if wanted else bool(values.get(other))

    def older(self, saved: Values) -> Any:
        """Return the value in a run that began before this flag existed. saved: the configuration of the run."""
        value = self.meta.get("older", self.default)
        return value(saved) if callable(value) else value


def flags_of(config_classes: Iterable[type]) -> list[Flag]:
    """Return the flags of some config dataclasses, in order."""
    result = []
    for cls in config_classes:
        for f in fields(cls):
            kind: Any = f.type
            is_list = kind in (list[int], list[float], list[str])
            default = f.default_factory() if callable(f.default_factory) else f.default
            group = str(cls.__doc__)
            result.append(
                Flag(f.name, kind.__args__[0] if is_list else kind, is_list, default, group, dict(f.metadata))
            )
    return result


RECORDED = flags_of((RecordedConfig,))
ALL_FLAGS = flags_of(sampler_family()) + RECORDED


def names_of(*roles: str) -> tuple[str, ...]:
    """Return the names of the flags that have one of these roles."""
    return tuple(flag.name for flag in ALL_FLAGS if flag.roles & set(roles))


ARCHITECTURE = ("autoencoder", "discriminator", "sampler")
OF_SAMPLING = names_of("sampling")


def key_of_samples(values: Values) -> dict[str, Any]:
    """Return {flag: value} for the flags that samples depend on. The keys of caches contain the result, in addition to
    the models. values: {flag: value} of all flags."""
    key = {}
    for flag in ALL_FLAGS:
        newer = "sampling" in flag.roles and values[flag.name] != flag.older(values)
        if newer or "keyed" in flag.roles:
            key[flag.name] = values[flag.name]
    return key
