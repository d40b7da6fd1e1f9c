"""Reads values from datasets.yaml, from presets and from runs under logs/. People or other programs may have written
the files. The values are therefore checked in the same way as the values of the command line."""

import contextlib
import difflib
import math
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hparams.config import ALL_FLAGS, RECORDED, SAMPLERS, Flag, Values, names_of
from hparams.presets import OF_DATA_SETS, PRESETS
from utils.core.errors import DamagedFile, UsageError
from utils.core.job import LOGS, REPOSITORY, ROOT, ROOT_VARIABLE, describe_root, in_root, is_main
from utils.core.json_files import hash_json, read_json
from utils.core.manifests import Manifests

DATASETS, LOCAL_DATASETS = (str(ROOT / name) for name in ("datasets.yaml", "datasets.local.yaml"))
ENTRY_KEYS = ("paths", "val_paths", "category", "preset", "hparams")
STAGES = ("vqgan", "sampler")

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_SHORT = reprlib.Repr()  # shortens values in messages, because ten lines of YAML can expand to 10^9 values
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 20, 200, 200
_OTHER_WORDS = {"gpu": "cuda", "cpus": "cpu", "ar": "autoregressive", "diffusion": "absorbing"}
_LARGEST_INT = 10**12  # flags without a maximum of their own have this one, because larger values overflow


# ---------------------------------------------------------------------- one value


def checked(flag: Flag, value: Any, where: str = "") -> Any:
    """Return the value, converted to the flag's type. Raise UsageError for a wrong type or range. The message names
    `where` and the flag."""
    name = f"{where}--{flag.name}"
    if not flag.is_list:
        return _checked_one(flag, value, name)
    if not isinstance(value, list) or not value:
        raise UsageError(f"{name} {_SHORT.repr(value)} must be a list, each of it {_KINDS[flag.type]}")
    return [_checked_one(flag, v, name) for v in value]


def _checked_one(flag: Flag, value: Any, name: str) -> Any:
    if flag.type is float and type(value) in (int, str):  # YAML reads 1e-3 as text
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if type(value) is not flag.type:
        raise UsageError(f"{name} {_SHORT.repr(value)} must be {_KINDS[flag.type]}")
    _check_range(flag.meta, value, name, largest=_LARGEST_INT if flag.type is int else math.inf)
    return value


def _check_range(meta: Values, value: Any, name: str, largest: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} {value} is not a finite number")
    if "min" in meta and value < meta["min"]:
        raise UsageError(f"{name} {value} is too small: the least is {meta['min']}")
    if "above" in meta and value <= meta["above"]:
        raise UsageError(f"{name} {value} is too small: it must be above {meta['above']:g}")
    if not isinstance(value, str) and value > meta.get("max", largest):
        raise UsageError(f"{name} {value} is too large: the most is {meta.get('max', largest)}")
    if "choices" in meta and value not in meta["choices"]:
        choices = [str(choice) for choice in meta["choices"]]
        hint = nearest(str(value), choices, "")
        raise UsageError(f"{name} {value} is unknown: {hint and hint + ' There are: '}{_listed(choices)}")


def nearest(word: str, words: Iterable[str], otherwise: str) -> str:
    """Return 'did you mean X?' with the most similar of `words`, ignoring case. Return `otherwise` if there is none."""
    by_case = {str(w).lower(): w for w in words}
    near = difflib.get_close_matches(_OTHER_WORDS.get(word.lower(), word.lower()), list(by_case), n=1)
    return f"did you mean {by_case[near[0]]}?" if near else otherwise


# ---------------------------------------------------------------------- the root


def tell_root() -> None:
    """If logs/ and datasets.yaml are not in the current folder, print one line that names their folder. Raise
    UsageError if the environment names a folder that does not exist."""
    if not ROOT.is_dir():
        raise UsageError(f"{ROOT_VARIABLE} names {ROOT}, which is not a folder: create it, or unset the variable")
    if is_main() and (line := describe_root()):
        print(f"note: {line}", file=sys.stderr)


# ---------------------------------------------------------------------- data sets


def dataset_entry(name: str, custom_path: str | None, is_read: bool = True) -> dict[str, Any]:
    """Return the data set's entry in datasets.yaml, or an entry for 'custom', as a dict with `name`, `paths` and
    `val_paths` (lists). is_read: whether the script reads the images; otherwise 'custom' needs no path."""
    if name == "custom":
        if not custom_path and is_read:
            raise UsageError("--dataset custom needs --custom_dataset_path DIR")
        paths = [custom_path] if custom_path else []
        return dict(name="custom", paths=paths, preset="custom", origin="--custom_dataset_path")
    if custom_path:
        raise UsageError(f"--custom_dataset_path goes with --dataset custom, not with --dataset {name}")
    entries = _all_entries()
    if name not in entries:
        names = [*entries, "custom"]
        hint = nearest(name, names, f"there are: {_listed(names)}")
        if os.path.exists(os.path.expanduser(name)):
            hint = f"a folder is given as --dataset custom --custom_dataset_path {name}"
        raise UsageError(f"--dataset {name} has no entry in {DATASETS}: {hint}")
    entry, file = entries[name]
    where = f"{file}, '{name}'"
    if not isinstance(entry, dict) or not entry.get("paths"):
        raise UsageError(f"{where}: needs an attribute 'paths' (a folder, or a list of folders)")
    for key in entry:
        if key not in ENTRY_KEYS:
            hint = nearest(str(key), ENTRY_KEYS, f"there are: {_listed(ENTRY_KEYS)}")
            raise UsageError(f"{where}: unknown attribute '{key}': {hint}")
    folders = {key: _folders(entry, key, where) for key in ("paths", "val_paths") if entry.get(key)}
    if not isinstance(entry.get("category", ""), str):
        raise UsageError(f"{where}: 'category' must be text")
    return {**entry, **folders, "name": name, "file": file, "origin": f"the entry '{name}' of {file}"}


def _folders(entry: Values, key: str, where: str) -> list[str]:
    paths = entry[key] if isinstance(entry[key], list) else [entry[key]]
    if not all(isinstance(p, str) and p for p in paths):
        raise UsageError(f"{where}: '{key}' must be a folder or a list of folders")
    return [in_root(p) for p in paths]


def _all_entries() -> dict[str, tuple[Any, str]]:
    """Return {name: (entry, its file)} of datasets.yaml and datasets.local.yaml. An attribute in datasets.local.yaml
    replaces the same attribute in datasets.yaml; null removes the attribute."""
    entries = {name: (entry, DATASETS) for name, entry in (_read_datasets(DATASETS) or {}).items()}
    local = _read_datasets(LOCAL_DATASETS)
    if local is None and not os.path.isfile(DATASETS):
        theirs = REPOSITORY / "datasets.yaml"
        raise UsageError(f"there is no {DATASETS} beside {LOGS}/: copy {theirs} there, or give --dataset custom")
    for name, entry in (local or {}).items():
        shared = entries[name][0] if name in entries else {}
        if isinstance(entry, dict) and isinstance(shared, dict):
            entry = {k: v for k, v in {**shared, **entry}.items() if v is not None}
        entries[name] = entry, LOCAL_DATASETS
    return entries


def _read_datasets(file: str) -> dict[str, Any] | None:
    """Return the entries of a file, or None if the file does not exist."""
    import yaml  # imported here, so that --help does not wait for yaml

    try:
        with open(file, encoding="utf-8") as f:
            entries = yaml.safe_load(f)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict):
        raise UsageError(f"{file} must hold one entry per data set ('name:' with 'paths:' under it)")
    return {str(k): v for k, v in entries.items()}


def file_of(entry: Values) -> str:
    """Return the file that holds a data set's entry."""
    return entry.get("file", DATASETS)


def preset_of(entry: Values) -> str:
    """Return the name of a data set's preset."""
    name = entry.get("preset", entry["name"] if entry["name"] in OF_DATA_SETS else "custom")
    if name not in list(PRESETS):
        hint = nearest(name, PRESETS, _listed(PRESETS)) if isinstance(name, str) else _listed(PRESETS)
        raise UsageError(f"{file_of(entry)}, '{entry['name']}': preset {_SHORT.repr(name)} is unknown: {hint}")
    return name


def preset_values(name: str, family: str) -> dict[str, Any]:
    """Return the defaults of a preset. A sampler gets the shapes of the autoencoder, but not its training flags."""
    stage_1 = PRESETS[name]["vqgan"]
    if family == "vqgan":
        return stage_1
    return {k: v for k, v in stage_1.items() if k in names_of("autoencoder")} | PRESETS[name]["sampler"]


def own_hparams(entry: Values, family: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Return {flag: value} from `hparams` of a data set's entry. Values under `vqgan` or `sampler` are for this stage
    only. flags: {name: Flag} of the script."""
    where, own = f"{file_of(entry)}, '{entry['name']}': ", entry.get("hparams")
    own = {} if own is None else own
    if not isinstance(own, dict) or not all(isinstance(own.get(s) or {}, dict) for s in STAGES):
        raise UsageError(f"{where}'hparams' must hold values by flag name, such as {{img_size: 128}}")
    own = {**{k: v for k, v in own.items() if k not in STAGES}, **(own.get(family) or {})}
    known = {f.name: f for f in ALL_FLAGS if f not in RECORDED}
    known = {k: f for k, f in {**known, **flags}.items() if not f.meta.get("required")}
    for key in own:
        if key in ENTRY_KEYS:
            raise UsageError(f"{where}'{key}' belongs beside 'hparams', not in it")
        if key not in known:
            raise UsageError(f"{where}'hparams' has no such flag: {key}: {nearest(str(key), known, 'see --help')}")
    own = {k: checked(known[k], v, where) for k, v in own.items()}
    return {k: in_root(v) if k in names_of("path") else v for k, v in own.items() if k in flags}


# ---------------------------------------------------------------------- saved configurations


def run_folder(name: str) -> Path:
    """Return the path logs/<name>. Raise UsageError if the name leads out of logs/ or has control characters."""
    path = Path(name)  # the anchor of a path is a root or a drive; on Windows "C:x" has a drive and no root
    if path.anchor or ".." in path.parts or not path.parts or not name.isprintable():
        raise UsageError(f"{name!r} is not a name under {LOGS}/: no absolute paths, no '..', no control characters")
    return LOGS / name


def require_folder(option: str, name: str) -> None:
    """If logs/<name> does not exist, raise a UsageError that lists the folders in logs/."""
    folder = run_folder(name)
    if os.path.isdir(folder):
        return
    there = sorted(p.name for p in LOGS.iterdir() if p.is_dir() and p.name[0] != ".") if LOGS.is_dir() else []
    hint = nearest(name.removeprefix(f"{LOGS}/"), there, f"{LOGS}/ holds {_listed(there) or 'nothing'}")
    raise UsageError(f"--{option} {name}: there is no folder {folder}: {hint}")


def holds_training(name: str) -> bool:
    """Say whether logs/<name> is the folder of a training run. The run may be a published one, or one that has no
    checkpoint yet."""
    run = Manifests(run_folder(name))
    with contextlib.suppress(OSError, DamagedFile):
        if run.config().get("script") in ("train_vqgan", "train_sampler"):
            return True
    return any(run.steps_of_model(model) for model in ("vqgan", *SAMPLERS))


def saved_config(folder: Path, flags: Mapping[str, Flag], step: int | None = None) -> dict[str, Any] | None:
    """Return the hparams that the run in a folder saved with the checkpoint of a step (None: the newest). If the
    manifest of the step has no hparams, take those of config.json. Return None for a published checkpoint, which has no
    hparams. flags: {name: Flag} of this script, whose values are checked."""
    path, manifests = folder / "config.json", Manifests(folder)
    try:
        saved = manifests.hparams(reversed(manifests.steps()) if step is None else [step])
        if saved is None:
            config = read_json(path)
            saved = config["hparams"]
            if config.get("digest", hash_json(saved)) != hash_json(saved):  # earlier versions wrote no digest
                raise ValueError
        saved = {k: checked(flags[k], v) if k in flags else v for k, v in saved.items() if v is not None}
        return {k: in_root(v) if k in names_of("path") else v for k, v in saved.items()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f" ({error})" if isinstance(error, UsageError) else ""
        raise UsageError(f"{path} is damaged{reason}: restore it, or remove it and give the model's flags") from None


def flags_given(name: str) -> list[str]:
    """Return the names of the flags that the command lines of the run in logs/<name> gave, from config.json. Return []
    if config.json does not list the flags."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [str(flag) for flag in Manifests(run_folder(name)).config()["given"]]
    return []


def same_images(one: Values, other: Values) -> bool:
    """Say whether two configurations ({flag: value}) name the same set of images."""
    paths = [c.get("custom_dataset_path") for c in (one, other)]
    real = {p and os.path.realpath(os.path.expanduser(in_root(p))) for p in paths}
    return one.get("dataset") == other.get("dataset") and len(real) == 1


def _listed(words: Iterable[Any]) -> str:
    return ", ".join(map(str, words))
