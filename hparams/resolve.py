"""From the command line to one complete configuration.

Precedence: class default < data set's preset < the loaded model's saved configuration < command line.
"""

import argparse
import difflib
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from hparams import config
from hparams.presets import PRESETS
from utils.errors import UsageError

LOGS = Path("logs")


class Hparams(SimpleNamespace):
    """The resolved configuration: one attribute a flag. `explicit` lists what the command line gave."""

    def to_dict(self):
        """Plain values, for config.json."""
        return {k: v for k, v in vars(self).items() if k not in ("explicit", "data_entry", "script")}


def vqgan_family():
    return (config.RunConfig, config.TrainConfig, config.OutputConfig, config.VQGANConfig)


def sampler_family():
    return (
        config.RunConfig, config.AutoencoderLoadConfig, config.SamplerConfig, config.TrainConfig,
        config.OutputConfig, config.VQGANConfig,
    )  # fmt: skip


# ---------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest what was meant."""

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def parse(self, argv):
        argv = sys.argv[1:] if argv is None else argv
        for word in argv:  # before argparse complains of a required flag that was only mistyped
            if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                self.error(self._explain_unknown(word))
        known, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._explain_unknown(unknown[0]))
        return vars(known)

    def _explain_unknown(self, word):
        options = [o for o in self._option_string_actions if o.startswith("--")]
        if not word.startswith("-"):
            if f"--{word}" in options:
                return f"unexpected word '{word}': did you mean --{word}?"
            return f"unexpected word '{word}' (a flag takes it only right after its name)"
        near = difflib.get_close_matches(word.split("=")[0], options, n=1)
        return f"unknown flag {word}" + (f": did you mean {near[0]}?" if near else " (see --help)")


class _Switch(argparse.Action):
    """--name and --no_name: the second undoes a preset or a loaded configuration."""

    def __init__(self, option_strings, dest, **kw):
        super().__init__(option_strings, dest, nargs=0, **kw)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def build_parser(flags, description, epilog):
    """An argparse parser in which nothing has a default, so that what was given is known."""
    parser = _Parser(
        description=description, epilog=epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    groups = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(*_option_strings(flag), **_argparse_kw(flag))
    return parser


def _option_strings(flag):
    if flag.type is bool and not flag.name.startswith("no_"):
        return f"--{flag.name}", f"--no_{flag.name}"
    return (f"--{flag.name}",)


def _argparse_kw(flag):
    meta = flag.meta
    kw = dict(dest=flag.name, help=(meta["help"] + _default_text(flag)).replace("%", "%%"))
    if meta.get("required"):
        kw["required"] = True
    if flag.type is bool:
        return dict(kw, action=_Switch)
    kw["type"] = flag.type
    if flag.is_list:
        kw["nargs"] = "+"
    if meta.get("choices"):
        kw["choices"] = meta["choices"]
    else:
        kw["metavar"] = meta.get("metavar", {int: "INT", float: "FLOAT", str: "STR"}[flag.type])
    return kw


def _default_text(flag):
    if flag.meta.get("required"):
        return " (required)"
    if flag.type is bool or flag.default is None:
        return ""
    value = " ".join(map(str, flag.default)) if flag.is_list else flag.default
    return f" (default: {value})"


# ---------------------------------------------------------------------- resolution


def get_hparams(family, description, argv=None, extra=(), epilog=None, script=None):
    """Parse and resolve a script's command line.

    family: 'vqgan' or 'sampler'. extra: config dataclasses of the script's own flags.
    Returns Hparams. On bad input: SystemExit(2) with one line on stderr.
    """
    classes = (*(vqgan_family() if family == "vqgan" else sampler_family()), *extra)
    flags = config.flags_of(classes)
    parser = build_parser(flags, description, epilog)
    given = parser.parse(argv)
    try:
        H = resolve(flags, given, family)
    except UsageError as error:
        parser.error(str(error))
    H.script = script or Path(sys.argv[0]).stem
    for name in config.WITHOUT_EFFECT:
        if name in given:
            print(f"note: --{name} is accepted for old command lines and has no effect", file=sys.stderr)
    return H


def resolve(flags, given, family):
    """Merge the sources by precedence, derive what can be derived, check everything."""
    _check_ranges(flags, given)
    entry = dataset_entry(given["dataset"], given.get("custom_dataset_path"))
    values = {flag.name: flag.default for flag in flags}
    values.update(_preset_of(entry, family, values))
    for source, keys, saved in _loaded_configs(given, values, family):
        _take_saved(values, given, source, keys, saved)
    values.update(given)
    H = Hparams(**values)
    H.explicit = sorted(given)
    H.data_entry = entry
    _derive(H, family)
    _check_ranges(flags, vars(H))
    _check_together(H, family)
    return H


def _check_ranges(flags, values):
    for flag in flags:
        value = values.get(flag.name)
        if value is None:
            continue
        for v in value if flag.is_list else [value]:
            _check_value(flag, v)


def _check_value(flag, value):
    meta = flag.meta
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--{flag.name} {value} is not a finite number")
    if "min" in meta and value < meta["min"]:
        raise UsageError(f"--{flag.name} {value} is too small: the least is {meta['min']}")
    if "above" in meta and value <= meta["above"]:
        raise UsageError(f"--{flag.name} {value} is too small: it must be above {meta['above']:g}")
    if "max" in meta and value > meta["max"]:
        raise UsageError(f"--{flag.name} {value} is too large: the most is {meta['max']}")


# -- data sets


def dataset_entry(name, custom_path, path="datasets.yaml"):
    """The data set's entry as a dict with `name` and `paths` (a list), from datasets.yaml or 'custom'."""
    if name == "custom":
        if not custom_path:
            raise UsageError("--dataset custom needs --custom_dataset_path DIR")
        return dict(name="custom", paths=[custom_path], preset="custom", origin="--custom_dataset_path")
    if custom_path:
        raise UsageError(f"--custom_dataset_path goes with --dataset custom, not with --dataset {name}")
    entries = _read_datasets(path)
    if name not in entries:
        near = difflib.get_close_matches(name, [*entries, "custom"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join([*entries, 'custom'])}"
        raise UsageError(f"--dataset {name} has no entry in {path}: {hint}")
    entry = entries[name]
    if not isinstance(entry, dict) or not entry.get("paths"):
        raise UsageError(f"{path}: the entry '{name}' needs an attribute 'paths' (a folder, or a list of folders)")
    paths = entry["paths"] if isinstance(entry["paths"], list) else [entry["paths"]]
    if not all(isinstance(p, str) for p in paths):
        raise UsageError(f"{path}: 'paths' of the entry '{name}' must be a folder or a list of folders")
    return dict(entry, name=name, paths=paths, origin=f"the entry '{name}' of {path}")


def _read_datasets(path):
    import yaml  # here, so that --help does not wait for it

    try:
        with open(path, encoding="utf-8") as f:
            entries = yaml.safe_load(f)
    except FileNotFoundError:
        raise UsageError(f"{path} is not in this folder: run from the repository's root") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict):
        raise UsageError(f"{path} must hold one entry a data set ('name:' with 'paths:' under it)")
    return {str(k): v for k, v in entries.items()}


def _preset_of(entry, family, known):
    name = entry.get("preset", entry["name"] if entry["name"] in PRESETS else "custom")
    if name not in PRESETS:
        raise UsageError(f"datasets.yaml: preset '{name}' of '{entry['name']}' is unknown: {', '.join(PRESETS)}")
    preset = dict(PRESETS[name]["vqgan"])
    if family == "sampler":
        for key in ("batch_size", "lr", "ema", "ema_beta", "horizontal_flip"):
            preset.pop(key, None)  # of the other stage's training
        preset.update(PRESETS[name]["sampler"])
    own = entry.get("hparams") or {}
    if not isinstance(own, dict) or set(own) - set(known):
        bad = ", ".join(set(own) - set(known)) if isinstance(own, dict) else own
        raise UsageError(f"datasets.yaml: 'hparams' of '{entry['name']}' has no such flag: {bad}")
    return {**preset, **own}


# -- saved configurations


def run_folder(name):
    """logs/<name>, refusing names that lead out of logs/."""
    folder = LOGS / name
    if os.path.isabs(name) or ".." in Path(name).parts or name in ("", "."):
        raise UsageError(f"'{name}' is not a name under {LOGS}/: no absolute paths, no '..'")
    return folder


def saved_config(name):
    """The hparams that a run saved in logs/<name>/config.json; None where there is none (a published
    checkpoint)."""
    path = run_folder(name) / "config.json"
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)["hparams"]
        if not isinstance(saved, dict):
            raise TypeError
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged: restore it, or remove it and give the model's flags") from None
    return saved


def _loaded_configs(given, values, family):
    """(where from, keys to take, saved values) of each model that this command loads, in order."""

    def value(name):
        return given.get(name, values.get(name))

    model_keys = config.VQGAN_KEYS if family == "vqgan" else config.SAMPLER_KEYS
    run_folder(value("log_dir"))
    sources = []
    if family == "sampler":
        sources.append((value("ae_load_dir"), config.AUTOENCODER_KEYS))
    if value("load_step") > 0:
        sources.append((value("load_dir"), model_keys))
    if value("resume"):
        sources.append((value("log_dir"), None))
    for name, keys in sources:
        saved = saved_config(name)
        if saved is not None:
            yield name, keys, saved


_NEVER_RESUMED = {"resume", "dry_run", "load_dir", "load_step", "load_optim", "log_dir", "custom_dataset_path"}


def _take_saved(values, given, source, keys, saved):
    """Take a loaded model's configuration; a command line that contradicts its architecture is an error."""
    fixed = keys or tuple(dict.fromkeys(config.VQGAN_KEYS + config.SAMPLER_KEYS))
    for key in fixed:
        if key in given and key in saved and given[key] != saved[key]:
            raise UsageError(
                f"--{key} {_show(given[key])} contradicts the model in logs/{source}, "
                f"which was trained with --{key} {_show(saved[key])}: leave the flag out"
            )
    wanted = keys if keys is not None else [k for k in saved if k not in _NEVER_RESUMED]
    values.update({k: saved[k] for k in wanted if k in saved and k in values})


def _show(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


# -- derived values and contradictions


def _derive(H, family):
    levels = len(H.ch_mult) - 1
    if H.img_size % 2**levels:
        raise UsageError(
            f"--img_size {H.img_size} is not divisible by {2**levels}, "
            f"which the {len(H.ch_mult)} levels of --ch_mult ask for"
        )
    side = H.img_size // 2**levels
    if H.latent_shape is None:
        H.latent_shape = [1, side, side]
    if H.attn_resolutions is None:
        H.attn_resolutions = [side]
    if H.batch_size is None:
        H.batch_size = 3 if family == "vqgan" else 20
    if H.num_workers is None:
        H.num_workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if family == "vqgan":
        if H.lr is None:
            H.lr = H.base_lr * H.batch_size
        return
    if H.lr is None:
        H.lr = 2e-4
    if H.block_size is None:
        H.block_size = math.prod(H.latent_shape)


def _check_together(H, family):
    side = H.img_size // 2 ** (len(H.ch_mult) - 1)
    if H.latent_shape != [1, side, side]:
        raise UsageError(
            f"--latent_shape {_show(H.latent_shape)} contradicts --img_size {H.img_size} and --ch_mult "
            f"{_show(H.ch_mult)}, which give 1 {side} {side}"
        )
    resolutions = [H.img_size // 2**i for i in range(len(H.ch_mult))]
    for r in H.attn_resolutions:
        if r not in resolutions:
            raise UsageError(
                f"--attn_resolutions {r} never occurs: --img_size {H.img_size} and --ch_mult "
                f"{_show(H.ch_mult)} give {_show(resolutions)}"
            )
    if H.nf % 32:
        raise UsageError(f"--nf {H.nf} must be a multiple of 32 (the groups of the normalisation)")
    if H.codebook_init == "kmeans" and H.quantizer != "nearest":
        raise UsageError("--codebook_init kmeans goes with --quantizer nearest only")
    if H.img_size >> H.disc_layers < 4 and family == "vqgan":
        raise UsageError(f"--disc_layers {H.disc_layers} is too many for --img_size {H.img_size}")
    if H.resume and "load_step" in H.explicit and H.load_step:
        raise UsageError("--resume and --load_step contradict each other: resume continues --log_dir itself")
    if family == "sampler":
        if H.block_size != math.prod(H.latent_shape):
            raise UsageError(
                f"--block_size {H.block_size} contradicts --latent_shape {_show(H.latent_shape)}, "
                f"which has {math.prod(H.latent_shape)} codes"
            )
        if H.bert_n_emb % H.bert_n_head:
            raise UsageError(f"--bert_n_head {H.bert_n_head} does not divide --bert_n_emb {H.bert_n_emb}")
