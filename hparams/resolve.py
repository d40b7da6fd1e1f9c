"""From the command line to one complete configuration.

Precedence: class default < data set's preset < the loaded model's saved configuration < command line.
"""

import copy
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from hparams import config
from hparams.config import sampler_family, vqgan_family
from hparams.parser import build_parser
from hparams.sources import (
    checked,
    checkpoint_steps,
    dataset_entry,
    preset_of,
    require_folder,
    run_folder,
    same_images,
    saved_config,
)
from utils.core.address import server_address
from utils.core.errors import UsageError, quit_quietly_at_interrupt
from utils.core.job import is_main, local_size, world_size


class Hparams(SimpleNamespace):
    """The resolved configuration: one attribute a flag. `explicit` lists what the command line gave; `older` holds the
    settings that a resumed run keeps from an earlier version, by name."""

    def to_dict(self):
        """Plain values, for config.json."""
        return {k: v for k, v in vars(self).items() if k not in ("explicit", "data_entry", "script", "older")}


def get_hparams(family, description, argv=None, extra=(), reads=(), settle=None, epilog=None, script=None):
    """Parse and resolve a script's command line.

    family: 'vqgan' or 'sampler'. extra: config dataclasses of the flags of a script that measures models
    rather than trains them; reads: which of the flags of training and sampling it uses; settle: called with
    the Hparams, for what is particular to the script.
    Returns Hparams. On bad input: SystemExit(2) with one line on stderr.
    """
    measures = bool(extra)
    if measures:
        idle = set(config.OF_TRAINING + config.OF_SAMPLING) - set(reads)
    else:
        idle = set(config.OF_VQGAN_TRAINING if family == "sampler" else ())
    classes = (*extra, *(vqgan_family() if family == "vqgan" else sampler_family()))
    flags = config.flags_of(classes)
    shown = {*config.SHOWN_FIRST["measures" if measures else family], *reads} - idle
    shown.update(flag.name for flag in config.flags_of(extra))
    parser = build_parser(flags, description, epilog, shown)
    given = parser.parse(argv)
    if argv is None:
        quit_quietly_at_interrupt()
    try:
        # Before the rest: a mistyped folder would show as a contradiction of the default shapes. A script that
        # measures may find all it needs in files, unless it names a checkpoint.
        if measures and given.get("load_step") and not given.get("dry_run"):
            _require_loaded(given)
        H = resolve(flags, given, family, idle)
        if not (measures or H.dry_run):
            _require_loaded(dict(vars(H), load_step=0 if continues(vars(H)) else H.load_step))
        if settle:
            settle(H)
        if "train_steps" not in idle:
            _check_shares(H, 1 if "accumulate_steps" in idle else H.accumulate_steps)
    except UsageError as error:
        parser.error(str(error))
    H.script = script or Path(sys.argv[0]).stem
    if is_main():
        for note in notes(H, flags, idle):
            print(f"note: {note}", file=sys.stderr)
    return H


def resolve(flags, given, family, idle=()):
    """Merge the sources by precedence, derive what can be derived, check everything.

    idle: names of flags that the script ignores.
    """
    by_name = {flag.name: flag for flag in flags}
    recorded = {flag.name: flag for flag in config.flags_of((config.RecordedConfig,))}
    given = {name: checked(by_name[name], value) for name, value in given.items()}
    entry = dataset_entry(given["dataset"], given.get("custom_dataset_path"))
    values = {flag.name: flag.default for flag in (*flags, *recorded.values())}
    values.update(preset_of(entry, family, by_name))
    if "load_optim" not in idle:
        values.update(_origin({**values, **given}, given, by_name))
    taken, older = _from_loaded({**values, **given}, given, family, {**by_name, **recorded}, idle)
    values.update(taken)
    values.update(given)
    H = Hparams(**copy.deepcopy(values))  # the presets keep their lists
    H.explicit = sorted(given)
    H.older = {k: v for k, v in older.items() if k not in given}
    H.data_entry = entry
    _check_places(H)
    _derive(H, family)
    _check_shapes(H)
    if family == "sampler":
        _check_codes(H)
        if "loss_type" not in idle:
            _check_loss_of_sampler(H)
    elif "train_steps" not in idle:
        _check_training_of_vqgan(H)
    return H


def _require_loaded(values):
    if values.get("ae_load_dir"):
        require_folder("ae_load_dir", values["ae_load_dir"])
    if values["load_step"]:
        require_folder("load_dir", values.get("load_dir", config.RunConfig.load_dir))


def notes(H, flags, idle=()):
    """Flags of the command line that do nothing, and what a run keeps from an earlier version, one sentence each.
    idle: flags that the script ignores."""
    if H.older:
        kept = ", ".join(f"{name} {shown(value)}" for name, value in H.older.items())
        yield f"logs/{H.log_dir} was started by an earlier version and continues as it began: {kept}"
    given = [flag for flag in flags if flag.name in H.explicit and getattr(H, flag.name) is not False]
    for flag in given:
        if flag.name in idle:
            yield f"--{flag.name} has no effect in this script"
            continue
        if flag.name in config.WITHOUT_EFFECT:
            yield f"--{flag.name} is accepted for old command lines and has no effect"
        for other in given:
            if flag.name in other.meta.get("replaces", ()):
                yield f"--{flag.name} has no effect beside --{other.name}"
        if flag.name == "base_lr" and H.lr != H.base_lr * H.batch_size:
            yield (
                f"--base_lr has no effect: --lr is {H.lr:g}, from the command line, the data set's defaults or the "
                "run that is resumed"
            )
        other, *wanted = flag.meta.get("needs", (None,))
        anything = wanted == [True]
        if other and other not in idle and not (getattr(H, other) if anything else getattr(H, other) in wanted):
            yield f"--{flag.name} has no effect without --{other}" + ("" if anything else f" {' or '.join(wanted)}")


# ---------------------------------------------------------------------- loaded models

# With --resume everything that the run saved holds, except where things are and what is asked now. The dashboard's
# address is among the latter: a folder from someone else must not decide where a login is sent.
_NEVER_RESUMED = (
    "resume",
    "dry_run",
    "log_dir",
    "custom_dataset_path",
    "visdom_compare",
    "visdom_server",
    "visdom_port",
    "no_visdom",
)
_ORIGIN = ("load_dir", "load_step", "load_optim")
_ARCHITECTURE = tuple(dict.fromkeys(config.VQGAN_KEYS + config.SAMPLER_KEYS))


def continues(values):
    """Whether --resume finds a checkpoint in --log_dir. values: {flag: value}."""
    return values["resume"] and bool(checkpoint_steps(values["log_dir"]))


def _origin(values, given, flags):
    """load_dir, load_step and load_optim of a run that is resumed. What it recorded is where it began, and stays;
    a run that has no checkpoint yet and recorded nothing takes them from the command line."""
    saved = (values["resume"] and saved_config(values["log_dir"], flags)) or {}
    origin = {name: saved[name] for name in _ORIGIN if name in saved}
    if not (origin.get("load_step") or continues(values)):
        return {}
    began = f"at step {origin['load_step']} of {origin['load_dir']}" if origin.get("load_step") else "afresh"
    other = any(given[name] != origin.get(name) for name in ("load_dir", "load_step") if name in given)
    if other and values["load_step"]:
        raise UsageError(
            f"--load_dir {values['load_dir']} --load_step {values['load_step']} contradicts --resume: logs/"
            f"{values['log_dir']} began {began}: leave them out, or give another --log_dir"
        )
    return origin


def _from_loaded(values, given, family, flags, idle):
    """What the models that this command loads were trained with. The command line may not contradict
    their architecture, nor one of them another's. Returns (values, those of them that a resumed run did not record
    because an earlier version started it)."""
    result, origins, older = {}, {}, {}
    for option, name, step, wanted, binding in _loads(values, family, flags, idle):
        saved = saved_config(name, flags, step)
        if saved is None:
            continue
        missing = {k: f.meta["older"] for k, f in flags.items() if "older" in f.meta and k not in saved}
        missing = {k: v(saved) if callable(v) else v for k, v in missing.items()}
        if option == "resume":
            older = {k: v for k, v in missing.items() if v != flags[k].default}
        source = f"--{option}" if option == "resume" else f"--{option} {name}"
        if option == "resume" and ("sampler" in saved) != (family == "sampler"):
            raise UsageError(f"--resume: logs/{name} is not a run of this script: give another --log_dir")
        if option == "ae_load_dir" and saved.get("codebook_init") == "kmeans":
            _require_placed_codes(name, step, saved.get("codebook_init_step", 0))
        _refuse_contradictions(given, saved, source, [k for k in binding if k not in idle])
        if "train_steps" in idle and same_images(saved, values):
            wanted = [*wanted, "steps_per_eval", "unique_images"]  # measured against the images it was trained on
        saved = {**missing, **saved}
        taken = {k: saved[k] for k in wanted if k in saved}
        for key in _ARCHITECTURE:
            if key in taken and result.get(key, taken[key]) != taken[key]:
                raise UsageError(
                    f"{source} and {origins[key]} do not belong together: "
                    f"--{key} {shown(taken[key])} and {shown(result[key])}"
                )
        result.update(taken)
        origins.update(dict.fromkeys(taken, source))
    return result, older


def _loads(values, family, flags, idle):
    """(flag that asks for it, folder, step (None: the newest), keys to take, keys that must not be contradicted) of
    each loaded model, in order."""
    if values.get("ae_load_dir"):  # required where a sampler is loaded, one of two ways to name a VQGAN elsewhere
        own = config.AUTOENCODER_KEYS
        yield "ae_load_dir", values["ae_load_dir"], values["ae_load_step"], own, own
    trains = "load_optim" not in idle  # then --load_dir is where the run begins; else what the script measures
    others = ()
    if values["load_step"] and not (trains and continues(values)):
        binding = config.VQGAN_KEYS if family == "vqgan" else config.SAMPLER_KEYS
        others = (*binding, *(config.SAMPLER_DEFAULTS if family == "sampler" else ()))
        # Another quantizer may have the same tensors; otherwise, loading them fails.
        yield "load_dir", values["load_dir"], values["load_step"], others, [k for k in binding if k != "quantizer"]
    if values["resume"] and "resume" not in idle:
        kept = (*_NEVER_RESUMED, *others, *(() if trains else _ORIGIN))
        wanted = [k for k in flags if k not in kept]
        yield "resume", values["log_dir"], None, wanted, [k for k in (*_ARCHITECTURE, "dataset") if k not in others]


def _require_placed_codes(name, step, placed):
    if step is not None and step < placed:
        raise UsageError(
            f"--ae_load_step {step}: logs/{name} puts its codes in place at step {placed} (--codebook_init kmeans); "
            "before that it has none"
        )


def _refuse_contradictions(given, saved, source, keys):
    for key in keys:
        if key in given and key in saved and given[key] != saved[key]:
            raise UsageError(
                f"--{key} {shown(given[key])} contradicts {source}, which was trained with --{key} {shown(saved[key])}"
            )


def shown(value):
    """A value as the command line writes it."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------------- derived values and contradictions


def _derive(H, family):
    halvings = len(H.ch_mult) - 1
    if H.img_size % 2**halvings:
        raise UsageError(
            f"--img_size {H.img_size} cannot be halved {halvings} times, which the {len(H.ch_mult)} levels of "
            "--ch_mult ask for"
        )
    side = H.img_size // 2**halvings
    if H.latent_shape is None:
        H.latent_shape = [1, side, side]
    if H.attn_resolutions is None:
        H.attn_resolutions = [side]
    if H.num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        H.num_workers = min(8, max(1, cores // local_size()))
    if H.lr is None:
        H.lr = H.base_lr * H.batch_size
        if H.lr == math.inf:
            raise UsageError(f"--base_lr {H.base_lr} times --batch_size {H.batch_size} is too large a learning rate")
    if family == "sampler" and H.block_size is None:
        H.block_size = math.prod(H.latent_shape)
    for name, default, _ in _exclusive_to_others(H.quantizer):  # a preset may have been made for another quantizer
        if name not in H.explicit:
            setattr(H, name, copy.copy(default))


def _exclusive_to_others(quantizer):
    """(flag, its default, its quantizers) of each flag that this quantizer does not accept."""
    facts_of = {flag: facts for flags in config.QUANTIZERS.values() for flag, facts in flags.items() if facts}
    return [
        (flag, facts["default"], ", ".join(config.quantizers_with(flag)))
        for flag, facts in facts_of.items()
        if facts.get("exclusive") and flag not in config.QUANTIZERS[quantizer]
    ]


def _check_places(H):
    for name in ("log_dir", "load_dir", "ae_load_dir"):
        if getattr(H, name, None) is not None:
            run_folder(getattr(H, name))
    for name in H.visdom_compare or ():
        if not (run_folder(name) / "stats.jsonl").is_file():
            require_folder("visdom_compare", name)
            raise UsageError(f"--visdom_compare {name}: logs/{name} has no stats.jsonl: it holds no training run")
    server_address(H.visdom_server, H.visdom_port)


def _check_shapes(H):
    resolutions = [H.img_size // 2**i for i in range(len(H.ch_mult))]
    side = resolutions[-1]
    by = f"--img_size {H.img_size} and --ch_mult {shown(H.ch_mult)}"
    if H.latent_shape != [1, side, side]:
        raise UsageError(f"--latent_shape {shown(H.latent_shape)} contradicts {by}, which give 1 {side} {side}")
    for r in H.attn_resolutions:
        if r not in resolutions:
            raise UsageError(f"--attn_resolutions {r} never occurs: {by} give {shown(resolutions)}")
    if H.nf % 32:
        raise UsageError(f"--nf {H.nf} must be a multiple of 32 (the groups of the normalisation)")
    if side == 1 and H.nf == 32 and 1 in H.ch_mult[-2:]:
        raise UsageError(f"--nf 32 is too small where {by} give 1 x 1 codes: the normalisation needs 2 values a group")


def _check_training_of_vqgan(H):
    for name, default, owner in _exclusive_to_others(H.quantizer):
        if getattr(H, name) != default:
            raise UsageError(
                f"--{name} {shown(getattr(H, name))} contradicts --quantizer {H.quantizer}: it is for {owner} only"
            )
    if H.codebook_init == "kmeans" and H.train_steps < H.codebook_init_step:
        raise UsageError(
            f"--train_steps {H.train_steps} ends before --codebook_init_step {H.codebook_init_step} "
            "puts the codes in place"
        )
    if H.img_size >> H.disc_layers < 3:  # two more convolutions take a pixel each
        raise UsageError(f"--disc_layers {H.disc_layers} is too many for --img_size {H.img_size}")


def _check_loss_of_sampler(H):
    if H.sampler == "absorbing" and H.loss_type == "reweighted_elbo" and H.total_steps == 1:
        raise UsageError(
            f"--loss_type {H.loss_type} is always 0 with --total_steps 1: its weight is 1 - t / total_steps; give "
            "--loss_type elbo or mlm, or more --total_steps"
        )


def _check_shares(H, parts):
    """Every process takes as much of a batch as the others, and every part of it."""
    processes = world_size()
    if H.batch_size % (processes * parts):
        by = [f"{processes} processes"] * (processes > 1) + [f"--accumulate_steps {parts}"] * (parts > 1)
        raise UsageError(
            f"--batch_size {H.batch_size} (of all processes together) is not divisible by {' times '.join(by)}"
        )


def _check_codes(H):
    codes = math.prod(H.latent_shape)
    if H.block_size != codes:
        raise UsageError(
            f"--block_size {H.block_size} contradicts --latent_shape {shown(H.latent_shape)}, which has {codes} codes"
        )
    if H.bert_n_emb % H.bert_n_head:
        raise UsageError(f"--bert_n_head {H.bert_n_head} does not divide --bert_n_emb {H.bert_n_emb}")
