"""Derives values from other values, finds contradictions between values, and notes flags without effect."""

import copy
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from decimal import Decimal
from typing import Any

from hparams.config import ALL_FLAGS, Flag
from hparams.presets import PAPER_LEVELS
from hparams.sources import holds_training, require_folder, run_folder
from utils.core.address import server_address
from utils.core.errors import UsageError
from utils.core.job import local_size, world_size

FEW_LEVELS = {0: [1], 1: [1, 2], 2: [1, 2, 4], 3: [1, 2, 2, 4]}  # --ch_mult for small numbers of halvings


def shown(value: Any) -> Any:
    """Write a value as text, in the form that the command line takes."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return f"{Decimal(repr(value)).normalize():e}"
    return " ".join(map(str, value)) if isinstance(value, list) else value


def near(n: int, step: int, most: int, works: Callable[[int], bool] = bool) -> str:
    """Return the multiples of `step` nearest to n, one below and one above, as text: "96 or 112". Only multiples up to
    `most` for which works(multiple) is true are possible."""
    floor = (n - 1) // step * step
    sides = range(floor, 0, -step), range(floor + step, most + 1, step)
    return " or ".join(str(m) for side in sides if (m := next(filter(works, side), None)))


def halvings_of(img_size: int) -> int:
    """Return the default number of halvings of an image. The codes are then about 16 x 16, or fewer below 64 pixels."""
    least = 2 if img_size >= 32 else 1 if img_size >= 8 else 0
    return max(round(math.log2(img_size / 16)), least)


def levels_of(img_size: int) -> list[int]:
    """Return the default of --ch_mult."""
    n = halvings_of(img_size)
    return list(FEW_LEVELS.get(n) or [1] * (n + 1 - len(PAPER_LEVELS)) + PAPER_LEVELS)


def derive(H: Any, flags: Iterable[Flag]) -> None:
    """Set the values that the command line, the data set and the loaded models leave open."""
    if H.ch_mult is None:
        if H.img_size % 2 ** halvings_of(H.img_size):
            sizes = near(H.img_size, 16 if H.img_size > 32 else 2, 8192, lambda n: n % 2 ** halvings_of(n) == 0)
            raise UsageError(
                f"--img_size {H.img_size} cannot be halved {halvings_of(H.img_size)} times, as its default --ch_mult "
                f"asks for: give --img_size {sizes}"
            )
        H.ch_mult = levels_of(H.img_size)
    halvings = len(H.ch_mult) - 1
    if H.img_size % 2**halvings:
        sizes = near(H.img_size, 2**halvings, 8192)
        raise UsageError(
            f"--img_size {H.img_size} cannot be halved {halvings} times, which the {len(H.ch_mult)} levels of "
            f"--ch_mult ask for: give {f'--img_size {sizes}' if sizes else 'fewer levels'}"
        )
    side = H.img_size // 2**halvings
    if H.latent_shape is None:
        H.latent_shape = [1, side, side]
    if H.attn_resolutions is None:
        H.attn_resolutions = [side]
    if H.num_workers is None:
        H.num_workers = usual_workers()
    if H.lr is None:
        H.lr = H.base_lr * H.batch_size
        if H.lr == math.inf:
            raise UsageError(f"--base_lr {H.base_lr} times --batch_size {H.batch_size} is too large a learning rate")
    if getattr(H, "block_size", 0) is None:
        H.block_size = math.prod(H.latent_shape)
    for flag in refused(H, flags):  # the values of a preset may be for another quantizer
        if flag.name not in H.explicit:
            setattr(H, flag.name, copy.copy(flag.default))


def usual_workers() -> int:
    """Return the default of --num_workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // local_size()))


def refused(H: Any, flags: Iterable[Flag]) -> list[Flag]:
    """Return the exclusive flags that lack the needed value of another flag. Such flags must have their defaults."""
    return [flag for flag in flags if "exclusive" in flag.meta and not flag.works(vars(H))]


def check(H: Any, flags: Collection[Flag], idle: Collection[str]) -> None:
    """Raise UsageError if values contradict each other. idle: names of flags that the script ignores."""
    check_places(H)
    if "load_optim" in idle and holds_training(H.log_dir):  # only scripts that measure ignore load_optim
        raise UsageError(
            f"--log_dir {H.log_dir}: logs/{H.log_dir} holds a training run: give another --log_dir for these results, "
            f"such as {H.log_dir}_results"
        )
    check_shapes(H)
    if "block_size" in vars(H):
        check_codes(H)
    for flag in refused(H, flags):
        value, (option, *owners) = getattr(H, flag.name), flag.needs
        if flag.name not in idle and value != flag.default:
            raise UsageError(
                f"--{flag.name} {shown(value)} contradicts --{option} {getattr(H, option)}: it is for "
                f"{', '.join(owners)} only"
            )
    for flag in flags:
        if "codes_from" in flag.meta and flag.name not in idle and flag.works(vars(H)):
            first = getattr(H, flag.name)
            if H.train_steps < first:
                raise UsageError(
                    f"--train_steps {H.train_steps} ends before --{flag.name} {first} puts the codes in place: give "
                    f"--train_steps {first} or more, or --{flag.name} {H.train_steps} or less"
                )
    if "disc_layers" not in idle and H.img_size >> H.disc_layers < 3:  # two more convolutions each remove a pixel
        most = int(math.log2(H.img_size / 3))
        remedy = f"--disc_layers {most} or fewer" if most else "--img_size 6 or more, with --disc_layers 1"
        raise UsageError(f"--disc_layers {H.disc_layers} is too many for --img_size {H.img_size}: give {remedy}")
    if "cache_images" not in idle and H.cache_images and H.random_crop < 1:
        raise UsageError(
            f"--random_crop {H.random_crop} contradicts --cache_images, which keeps the centre of each image: leave "
            "one of them out"
        )
    if "crops" not in idle and getattr(H, "crops", 1) > 1 and H.random_crop == 1:
        raise UsageError(
            f"--crops {H.crops} needs a VQGAN that was trained with --random_crop, which logs/{H.ae_load_dir} was not: "
            "train one, or leave --crops out"
        )
    absorbing = "loss_type" not in idle and getattr(H, "sampler", None) == "absorbing"
    if absorbing and H.loss_type == "reweighted_elbo" and H.total_steps == 1:
        raise UsageError(
            f"--loss_type {H.loss_type} is always 0 with --total_steps 1: its weight is 1 - t / total_steps; give "
            "--loss_type elbo or mlm, or more --total_steps"
        )
    if "top_k" not in idle and "top_k" in vars(H):
        check_sampling(H, H.explicit, idle)
    if "train_steps" not in idle:
        check_shares(H, 1 if "accumulate_steps" in idle else H.accumulate_steps)


def check_places(H: Any) -> None:
    for name in ("log_dir", "load_dir", "ae_load_dir"):
        if getattr(H, name, None) is not None:
            run_folder(getattr(H, name))
    for name in H.visdom_compare or ():
        if not (run_folder(name) / "stats.jsonl").is_file():
            require_folder("visdom_compare", name)
            raise UsageError(f"--visdom_compare {name}: logs/{name} has no stats.jsonl: it holds no training run")
    server_address(H.visdom_server, H.visdom_port)


def check_shapes(H: Any) -> None:
    resolutions = [H.img_size // 2**i for i in range(len(H.ch_mult))]
    side = resolutions[-1]
    by = f"--img_size {H.img_size} and --ch_mult {shown(H.ch_mult)}"
    if H.latent_shape != [1, side, side]:
        raise UsageError(f"--latent_shape {shown(H.latent_shape)} contradicts {by}, which give 1 {side} {side}")
    for r in H.attn_resolutions:
        if r not in resolutions:
            raise UsageError(f"--attn_resolutions {r} never occurs: {by} give {shown(resolutions)}")
    if H.nf % 32:
        raise UsageError(
            f"--nf {H.nf} must be a multiple of 32 (the groups of the normalisation): give --nf "
            f"{near(H.nf, 32, 16_384)}"
        )
    if side == 1 and H.nf == 32 and 1 in H.ch_mult[-2:]:
        raise UsageError(
            f"--nf 32 is too small if {by} give 1 x 1 codes: the normalisation needs 2 values per group: give --nf 64"
        )


def check_codes(H: Any) -> None:
    codes = math.prod(H.latent_shape)
    if H.block_size != codes:
        raise UsageError(
            f"--block_size {H.block_size} contradicts --latent_shape {shown(H.latent_shape)}, which has {codes} codes"
        )
    if H.bert_n_emb % H.bert_n_head:
        raise UsageError(
            f"--bert_n_head {H.bert_n_head} does not divide --bert_n_emb {H.bert_n_emb}: give --bert_n_emb "
            f"{near(H.bert_n_emb, H.bert_n_head, 65_536)}"
        )


def check_sampling(H: Any, given: Collection[str], idle: Collection[str] = ()) -> None:
    """given: the flags that the user gave. --sample_type mlm ignores the order of a preset."""
    if H.top_k > H.codebook_size:
        raise UsageError(f"--top_k {H.top_k} is more than there are codes, {H.codebook_size}: give fewer, or 0 for all")
    if H.sampler == "absorbing" and H.sample_type == "mlm" and "sample_type" not in idle:
        for flag in ALL_FLAGS:
            ignored = flag.name in ("sample_order", "sample_schedule", "remask_eta") and flag.name in given
            if ignored and getattr(H, flag.name) != flag.default:
                raise UsageError(
                    f"--{flag.name} {getattr(H, flag.name)} contradicts --sample_type mlm, which draws all codes again "
                    "at each step: leave one of them out"
                )


def check_shares(H: Any, parts: int) -> None:
    """Raise UsageError if the processes cannot have equal shares of the batch, or a share cannot have equal parts."""
    processes = world_size()
    if H.batch_size % (processes * parts):
        by = [f"{processes} processes"] * (processes > 1) + [f"--accumulate_steps {parts}"] * (parts > 1)
        raise UsageError(
            f"--batch_size {H.batch_size} (of all processes together) is not divisible by {' times '.join(by)}: give "
            f"--batch_size {near(H.batch_size, processes * parts, 10**12)}"
        )


def notes(H: Any, flags: Iterable[Flag], idle: Collection[str] = ()) -> Iterator[str]:
    """Yield one sentence for each flag of the command line that has no effect. Derived values and values of an earlier
    version that the user should know have a sentence, too. idle: names of flags that the script ignores."""
    if H.older:
        kept = ", ".join(f"{name} {shown(value)}" for name, value in H.older.items())
        yield f"logs/{H.log_dir} was started by an earlier version and continues as it began: {kept}"
    for name in H.chosen:
        yield f"--{name} {getattr(H, name)}: {H.sources[name]}"
    if H.sources["ch_mult"] == "derived" and H.ch_mult != PAPER_LEVELS:
        yield (
            f"--ch_mult {shown(H.ch_mult)}, chosen for --img_size {H.img_size}: {H.latent_shape[1]} x "
            f"{H.latent_shape[2]} codes"
        )
    if H.sources["preset"].startswith(("--ae_load_dir", "--load_dir")) and H.preset and "train_steps" not in idle:
        yield f"--preset {H.preset}, as {H.sources['preset']} was trained with"
    given = [flag for flag in flags if flag.name in H.explicit and getattr(H, flag.name) is not False]
    for flag in given:
        if flag.name in idle:
            yield f"--{flag.name} has no effect in this script"
            continue
        if "ignored" in flag.roles:
            yield f"--{flag.name} is accepted for old command lines and has no effect"
        for other in given:
            if flag.name in other.meta.get("replaces", ()):
                yield f"--{flag.name} has no effect beside --{other.name}"
        if flag.name == "base_lr" and H.lr != H.base_lr * H.batch_size:
            yield (
                f"--base_lr has no effect: --lr is {H.lr:g}, from the command line, the data set's defaults or the "
                "run that is resumed"
            )
        if not flag.works(vars(H)) and flag.needs[0] not in idle:
            needed, *values = flag.needs
            yield f"--{flag.name} has no effect without --{needed} {' or '.join(values)}".rstrip()
