"""Every flag of both stages: name, type, default, range, meaning. The names are the interface. The flags of one
quantizer are in its file.

A default of None means that the value is derived (see hparams/resolve.py) or not used; the help explains it.
"""

import ast
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"


def opt(default, help, **kw):
    """A flag. kw: min and max (inclusive), above (exclusive minimum), choices, required, metavar, and
    needs=(other flag, its values, or True for any but 0): without that this flag does nothing, and a note reports it;
    replaces=names of flags: in addition to this one they do nothing. older=its value in a run whose saved configuration
    lacks it: one that began before there was this flag; or a function of that configuration.
    repeatable: each use of the flag adds to the list.
    Of a quantizer's flags: architecture: the tensors of a checkpoint depend on it; exclusive: with another quantizer
    any value but the default is refused."""
    kw["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=kw)
    return field(default=default, metadata=kw)


def registered(folder):
    """{name that a file of models/<folder> registers: its FLAGS, {} if it has none}, read from the source: importing
    the file would import torch."""
    result = {}
    for path in sorted((MODELS / folder).glob("*.py")):
        names, flags = [], {}
        for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
            if isinstance(node, ast.ClassDef):
                calls = [
                    d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "register"
                ]
                names += [call.args[0].value for call in calls]
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS":
                flags = ast.literal_eval(node.value)
        result.update(dict.fromkeys(names, flags))
    return result


QUANTIZERS = registered("quantizers")


def quantizers_with(flag):
    """The names of the quantizers that have this flag."""
    return [name for name, flags in QUANTIZERS.items() if flag in flags]


@dataclass
class RunConfig:
    """run and files"""

    dataset: str = opt(None, "data set: an entry of datasets.yaml, or 'custom'", required=True)
    custom_dataset_path: str = opt(None, "folder of images (or LMDB) for --dataset custom", metavar="DIR")
    log_dir: str = opt("test", "the run's folder under logs/", metavar="NAME")
    load_dir: str = opt(
        "test", "folder under logs/ to load a model from (see --load_step)", metavar="NAME", needs=("load_step", True)
    )
    load_step: int = opt(0, "start from the weights of this step of --load_dir; 0: start afresh", min=0)
    load_optim: bool = opt(False, "with --load_step, load the optimisers' state too", needs=("load_step", True))
    resume: bool = opt(False, "continue --log_dir from its newest complete checkpoint, exactly where it was")
    seed: int = opt(0, "seed of everything random", min=0, max=2**63 - 1)
    device: str = opt("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    num_workers: int = opt(
        None,
        "processes that decode images, for each of torchrun's (default: all together one a core, at most 8)",
        min=0,
        max=1024,
    )
    cache_images: bool = opt(False, "keep the decoded, resized images in files under packed/, and train from those")
    dry_run: bool = opt(False, "print the resolved configuration and the model's size and cost, then stop")


@dataclass
class TrainConfig:
    """training"""

    train_steps: int = opt(100_000_000, "train up to and including this step", min=1)
    batch_size: int = opt(
        None,
        "images (or code sequences) a step, of all processes together (default: 3 for the VQGAN, 20 for samplers)",
        min=1,
        max=1_000_000,
    )
    accumulate_steps: int = opt(
        1,
        "parts in which a process takes its share of a batch through memory, one after the "
        "other; the result is the whole batch's",
        min=1,
        max=1_000_000,
    )
    lr: float = opt(
        None, "learning rate (default: base_lr x batch_size for the VQGAN; samplers 2e-4, ffhq 1e-4)", above=0.0
    )
    amp: bool = opt(False, "mixed precision")
    amp_dtype: str = opt(
        "auto",
        "number format of --amp; auto: bf16 where the device has it, else fp16",
        choices=["auto", "bf16", "fp16"],
        needs=("amp", True),
    )
    compile: str = opt(
        "auto",
        "torch.compile for the large networks; auto: on CUDA, where there is much to compute",
        choices=["auto", "on", "off"],
    )
    ema: bool = opt(False, "keep an exponential moving average of the weights (and prefer it when loading)")
    ema_beta: float = opt(
        0.995, "decay of the moving average at each of its updates", min=0.0, max=1.0, needs=("ema", True)
    )
    steps_per_update_ema: int = opt(10, "steps between updates of the moving average", min=1, needs=("ema", True))


@dataclass
class OutputConfig:
    """logging, pictures, checkpoints, dashboard (steps between; 0: never)"""

    steps_per_log: int = opt(10, "steps between lines of stats.jsonl", min=1)
    steps_per_eval: int = opt(0, "steps between validations; 0: no validation, a folder trains on all images", min=0)
    steps_per_display_output: int = opt(5000, "steps between pictures on the dashboard", min=0)
    steps_per_save_output: int = opt(5000, "steps between pictures saved under logs/<log_dir>/images", min=0)
    steps_per_checkpoint: int = opt(25_000, "steps between checkpoints (one is written at the end, always)", min=0)
    keep_checkpoints: int = opt(
        0, "checkpoints of this run to keep, the newest complete ones (1 counts as 2); 0: all", min=0
    )
    save_individually: bool = opt(False, "save pictures one by one rather than as one sheet")
    visdom_port: int = opt(8097, "port of the visdom server", min=1, max=65535)
    visdom_server: str = opt(None, "address of the visdom server (default: this machine)", metavar="URL")
    visdom_compare: list[str] = opt(
        None, "runs under logs/ whose curves are to stand in the same plots", metavar="LOG_DIR"
    )
    no_visdom: bool = opt(False, "do not talk to a visdom server", replaces=("visdom_compare",))


@dataclass
class VQGANConfig:
    """VQGAN"""

    img_size: int = opt(256, "side of the square training images in pixels", min=4, max=8192)
    n_channels: int = opt(3, "image channels: 3 (colour) or 1 (grey)", choices=[1, 3])
    nf: int = opt(128, "width of the first level; a multiple of 32", min=32, max=16_384)
    ch_mult: list[int] = opt(
        [1, 1, 2, 2, 4], "width of each level as a multiple of nf; the image is halved between levels", min=1, max=1024
    )
    res_blocks: int = opt(2, "residual blocks a level", min=1, max=100)
    attn_resolutions: list[int] = opt(None, "resolutions with attention (default: the latents' side)", min=1)
    latent_shape: list[int] = opt(None, "1, height and width of the codes (default: from img_size and ch_mult)", min=1)
    emb_dim: int = opt(256, "length of a codebook vector", min=1, max=65_536)
    codebook_size: int = opt(1024, "number of codes", min=1, max=1_000_000)
    quantizer: str = opt("nearest", "how latents become codes", choices=list(QUANTIZERS))


def _of_quantizers():
    """A dataclass of the flags that the files of quantizers declare. A flag has the type of its default, and needs one
    of its quantizers unless it says otherwise."""
    declared = []
    for flag, facts in ((flag, facts) for flags in QUANTIZERS.values() for flag, facts in flags.items() if facts):
        default = facts["default"]
        kind = list[type(default[0])] if isinstance(default, list) else type(default)
        declared.append((flag, kind, opt(**{"needs": ("quantizer", *quantizers_with(flag)), **facts})))
    return make_dataclass("QuantizerConfig", declared, namespace=dict(__doc__=VQGANConfig.__doc__))


QuantizerConfig = _of_quantizers()


@dataclass
class VQGANTrainingConfig:
    """VQGAN"""

    base_lr: float = opt(4.5e-6, "learning rate an image of the batch, unless --lr", above=0.0)
    perceptual_weight: float = opt(1.0, "weight of LPIPS; 0: no VGG weights needed", min=0.0)
    perceptual_weights: str = opt(
        None,
        "file with the VGG16 weights for LPIPS (default: torchvision's place)",
        metavar="PATH",
        needs=("perceptual_weight", True),
    )
    ndf: int = opt(64, "width of the discriminator's first layer", min=1, max=16_384)
    disc_layers: int = opt(3, "layers of the discriminator", min=1, max=30)
    disc_start_step: int = opt(30_001, "step at which the discriminator joins", min=0)
    disc_weight_max: float = opt(1.0, "upper bound of the discriminator's adaptive weight", min=0.0)
    diff_aug: bool = opt(False, "differentiable augmentation of the discriminator's inputs")
    horizontal_flip: bool = opt(False, "mirror images: each with probability 1/2 (VQGAN), both ways cached (samplers)")


@dataclass
class AutoencoderLoadConfig:
    """autoencoder to load"""

    ae_load_dir: str = opt(None, "folder under logs/ that holds the VQGAN", required=True, metavar="NAME")
    ae_load_step: int = opt(None, "step of the VQGAN to load", required=True, min=0)


@dataclass
class SamplerConfig:
    """sampler"""

    sampler: str = opt(None, "prior over the codes", required=True, choices=list(registered("samplers")))
    bert_n_emb: int = opt(512, "width of the Transformer", min=1, max=65_536)
    bert_n_head: int = opt(8, "attention heads; must divide bert_n_emb", min=1, max=65_536)
    bert_n_layers: int = opt(24, "layers of the Transformer", min=1, max=1000)
    block_size: int = opt(None, "tokens a sequence (default: from latent_shape)", min=1)
    embd_pdrop: float = opt(0.0, "dropout of the embeddings", min=0.0, max=0.999)
    attn_pdrop: float = opt(0.0, "dropout of the attention weights", min=0.0, max=0.999)
    resid_pdrop: float = opt(0.0, "dropout of the residual branches", min=0.0, max=0.999)
    loss_type: str = opt(
        "reweighted_elbo",
        "training loss (absorbing)",
        choices=["reweighted_elbo", "elbo", "mlm"],
        needs=("sampler", "absorbing"),
    )
    mask_schedule: str = opt(
        "random",
        "mask each code with probability t/T, or exactly round(tL/T) codes (absorbing)",
        choices=["random", "fixed"],
        needs=("sampler", "absorbing"),
    )
    total_steps: int = opt(
        256,
        "T, time steps of the diffusion in training (absorbing)",
        min=1,
        max=1_000_000,
        needs=("sampler", "absorbing"),
    )
    sample_steps: int = opt(
        256, "S, time steps when sampling (absorbing)", min=1, max=1_000_000, needs=("sampler", "absorbing")
    )
    sample_type: str = opt(
        "diffusion", "how to sample (absorbing)", choices=["diffusion", "mlm"], needs=("sampler", "absorbing")
    )
    temp: float = opt(1.0, "temperature of the codes' distribution when sampling", min=1e-37)
    warmup_iters: int = opt(10_000, "steps over which the learning rate rises linearly to lr (ffhq: 30000)", min=0)
    greedy_epochs: int = opt(None, "accepted for old command lines, without effect", min=0)
    greedy: bool = opt(False, "accepted for old command lines, without effect")
    sample_block_size: int = opt(None, "accepted for old command lines, without effect", min=0)


@dataclass
class RecordedConfig:
    """Settings without a flag. A run records them, so that a run of an earlier version continues as it began."""

    codes_precision: str = opt(
        "float32",
        "number format in which stage 2 encodes the images; amp: that of --amp_dtype",
        choices=["float32", "amp"],
        older=lambda saved: "amp" if saved.get("amp") else "float32",
    )
    unique_images: bool = opt(True, "a file that several paths or links lead to is one image", older=False)


WITHOUT_EFFECT = ("greedy_epochs", "greedy", "sample_block_size")

# Flags that not every script reads, by purpose. (--ema is not among them: averaged weights are preferred with or
# without it.)
OF_VQGAN_TRAINING = (
    *(f.name for f in fields(QuantizerConfig) if not f.metadata.get("architecture")),
    "base_lr",
    "perceptual_weight",
    "perceptual_weights",
    "ndf",
    "disc_layers",
    "disc_start_step",
    "disc_weight_max",
    "diff_aug",
    "cache_images",
)
OF_SAMPLING = ("temp", "sample_steps", "sample_type", "mask_schedule")
OF_TRAINING = (
    *OF_VQGAN_TRAINING,
    "load_optim",
    "resume",
    "train_steps",
    "accumulate_steps",
    "lr",
    "ema_beta",
    "steps_per_update_ema",
    "steps_per_log",
    "steps_per_display_output",
    "steps_per_save_output",
    "steps_per_checkpoint",
    "keep_checkpoints",
    "save_individually",
    "visdom_compare",
    "horizontal_flip",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "loss_type",
    "warmup_iters",
)

# What --help shows beside the required flags and a script's own, by kind of script; --help_all shows all.
COMMON = ("custom_dataset_path", "log_dir", "seed", "device", "dry_run", "batch_size", "amp", "no_visdom")
_COMMON_IN_TRAINING = (
    *COMMON,
    "resume",
    "load_dir",
    "load_step",
    "train_steps",
    "lr",
    "ema",
    "steps_per_eval",
    "steps_per_save_output",
    "steps_per_checkpoint",
    "keep_checkpoints",
)
SHOWN_FIRST = dict(
    vqgan=(
        *_COMMON_IN_TRAINING,
        "img_size",
        "ch_mult",
        "codebook_size",
        "codebook_init",
        "codebook_restart_steps",
        "perceptual_weight",
        "perceptual_weights",
        "disc_start_step",
        "diff_aug",
        "horizontal_flip",
    ),
    sampler=(*_COMMON_IN_TRAINING, "bert_n_emb", "bert_n_layers", "sample_steps", "temp", "warmup_iters"),
    measures=(*COMMON, "load_dir", "load_step", *OF_SAMPLING),
)

# What a checkpoint's tensors depend on: a command line may not contradict a loaded model in these.
AUTOENCODER_KEYS = (
    "img_size",
    "n_channels",
    "nf",
    "ch_mult",
    "res_blocks",
    "attn_resolutions",
    "latent_shape",
    "emb_dim",
    "codebook_size",
    "quantizer",
    *(f.name for f in fields(QuantizerConfig) if f.metadata.get("architecture")),
)
VQGAN_KEYS = (*AUTOENCODER_KEYS, "ndf", "disc_layers")
SAMPLER_KEYS = (
    "sampler",
    "bert_n_emb",
    "bert_n_head",
    "bert_n_layers",
    "block_size",
    "codebook_size",
    "latent_shape",
    "total_steps",
)
# What else of a loaded sampler's configuration holds unless the command line says otherwise.
SAMPLER_DEFAULTS = ("mask_schedule",)


_VQGAN = (VQGANConfig, QuantizerConfig, VQGANTrainingConfig)


def vqgan_family():
    """The flags of scripts that train or load a VQGAN."""
    return RunConfig, TrainConfig, OutputConfig, *_VQGAN


def sampler_family():
    """The flags of scripts that train or load a sampler."""
    return RunConfig, AutoencoderLoadConfig, SamplerConfig, TrainConfig, OutputConfig, *_VQGAN


@dataclass(frozen=True)
class Flag:
    """One flag as the parser and the checks need it."""

    name: str
    type: type  # of one value: bool, int, float or str
    is_list: bool
    default: object
    group: str
    meta: dict = field(hash=False)


def flags_of(config_classes):
    """The flags of some config dataclasses, in order."""
    result = []
    for cls in config_classes:
        for f in fields(cls):
            is_list = f.type in (list[int], list[str])
            default = f.default_factory() if callable(f.default_factory) else f.default
            kind = f.type.__args__[0] if is_list else f.type
            result.append(Flag(f.name, kind, is_list, default, cls.__doc__, dict(f.metadata)))
    return result
