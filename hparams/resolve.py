"""From the command line to one complete configuration.

Precedence: default < preset of the data set < saved configuration of a loaded model < command line.
"""

import copy
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hparams import config, sources
from hparams.checks import check, derive, notes, shown
from hparams.config import ARCHITECTURE, Flag, Values, names_of
from hparams.environment import COMMON, require_packages
from hparams.parser import build_parser
from utils.core.errors import UsageError, quit_quietly_at_interrupt
from utils.core.job import is_main

# By kind of script: the roles of flags that it ignores, and those that --help does not show although they are common.
IGNORED = {"vqgan": (), "sampler": ("vqgan", "discriminator")}
IGNORED["measures"] = (*IGNORED["sampler"], "training", "sampling")
HIDDEN = {"vqgan": (), "sampler": ("autoencoder",), "measures": (*ARCHITECTURE, "images", "stages")}


class Hparams(SimpleNamespace):
    """The resolved configuration: one attribute a flag. `explicit` lists what the command line gave; `older` holds the
    settings that a resumed run keeps from an earlier version, by name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return {k: v for k, v in vars(self).items() if k not in ("explicit", "data_entry", "script", "older")}

    def given(self, *roles: str) -> dict[str, Any]:
        """{flag: value} of what the command line gave, of the flags that have one of these roles."""
        return {name: getattr(self, name) for name in names_of(*roles) if name in self.explicit}


def get_hparams(
    family: str,
    description: str,
    argv: Sequence[str] | None = None,
    extra: Iterable[type] = (),
    reads: Iterable[str] = (),
    settle: Callable[[Hparams], None] | None = None,
    reads_images: bool = True,
    epilog: str | None = None,
    script: str | None = None,
) -> Hparams:
    """Parse and resolve the command line of a script.

    family: 'vqgan' or 'sampler'. extra: config dataclasses of the flags of a script that measures models instead of
    training them; reads: which of the flags of training and sampling it uses; settle: called with the Hparams, for what
    is particular to the script; reads_images: whether it reads the images of --dataset.
    On bad input: SystemExit(2) with one line on stderr.
    """
    kind = "measures" if extra else family
    own = config.flags_of(extra)
    flags = own + config.flags_of(config.vqgan_family() if family == "vqgan" else config.sampler_family())
    idle = set(names_of(*IGNORED[kind])) - set(reads)
    common = set(names_of("common")) - set(names_of(*HIDDEN[kind]))
    parser = build_parser(flags, description, epilog, (common | set(reads)) - idle | {flag.name for flag in own})
    given = parser.parse(argv)
    if argv is None:
        quit_quietly_at_interrupt()
        require_packages(*COMMON)
    try:
        H = resolve(flags, given, family, idle, reads_images)
        if settle:
            settle(H)
    except UsageError as error:
        parser.error(str(error))
    H.script = script or Path(sys.argv[0]).stem
    if is_main():
        for note in notes(H, flags, idle):
            print(f"note: {note}", file=sys.stderr)
    return H


def resolve(
    flags: Iterable[Flag], given: Values, family: str, idle: Collection[str] = (), reads_images: bool = True
) -> Hparams:
    """Merge the sources by precedence, derive what can be derived, check everything.

    given: {flag: value} of the command line. idle: names of flags that the script ignores.
    """
    by_name = {flag.name: flag for flag in flags}
    every = by_name | {flag.name: flag for flag in config.RECORDED}
    trains = "load_optim" not in idle
    given = {name: sources.checked(by_name[name], value) for name, value in given.items()}
    entry = sources.dataset_entry(given["dataset"], given.get("custom_dataset_path"), reads_images)
    values = {name: flag.default for name, flag in every.items()} | sources.preset_of(entry, family, by_name)
    if trains:
        values |= origin(values | given, given, every)
    require_loaded(values | given, trains)
    loaded, older = loaded_values(values | given, given, family, every, idle)
    H = Hparams(**copy.deepcopy(values | loaded | given))  # the presets keep their lists
    H.explicit = sorted(given)
    H.older = {k: v for k, v in older.items() if k not in given}
    H.data_entry = entry
    derive(H, by_name.values())
    check(H, by_name.values(), idle)
    return H


# ---------------------------------------------------------------------- loaded models


def continues(values: Values) -> bool:
    """Whether --resume finds a checkpoint in --log_dir. values: {flag: value}."""
    return values["resume"] and bool(sources.checkpoint_steps(values["log_dir"]))


def origin(values: Values, given: Values, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """load_dir, load_step and load_optim of a run that is resumed. What it recorded is where it began, and stays;
    a run that has no checkpoint yet and recorded nothing takes them from the command line."""
    saved = (values["resume"] and sources.saved_config(values["log_dir"], flags)) or {}
    found = {name: saved[name] for name in names_of("origin") if name in saved}
    if not (found.get("load_step") or continues(values)):
        return {}
    began = f"at step {found['load_step']} of {found['load_dir']}" if found.get("load_step") else "afresh"
    other = any(given[name] != found.get(name) for name in ("load_dir", "load_step") if name in given)
    if other and values["load_step"]:
        raise UsageError(
            f"--load_dir {values['load_dir']} --load_step {values['load_step']} contradicts --resume: logs/"
            f"{values['log_dir']} began {began}: leave them out, or give another --log_dir"
        )
    return found


def require_loaded(values: Values, trains: bool) -> None:
    """UsageError if a folder to load from does not exist. Otherwise a mistyped folder would show as a contradiction of
    the default shapes. A script that measures may find all it needs in files, unless it names a checkpoint."""
    if values["dry_run"] or not (trains or values["load_step"]):
        return
    if values.get("ae_load_dir"):
        sources.require_folder("ae_load_dir", values["ae_load_dir"])
    if values["load_step"] and not (trains and continues(values)):
        sources.require_folder("load_dir", values["load_dir"])


@dataclass
class Load:
    """A run whose configuration is read: the flag that asks for it, its folder, the step (None: the newest), the flags
    that take their values from it, and those that the command line may not contradict."""

    option: str
    folder: str
    step: int | None
    takes: Iterable[str]
    binding: Iterable[str]

    def __str__(self) -> str:
        return f"--{self.option}" if self.option == "resume" else f"--{self.option} {self.folder}"


def loads(values: Values, family: str, flags: Iterable[str], idle: Collection[str]) -> Iterator[Load]:
    """The runs that this command reads, in order: a later one takes precedence."""
    if values.get("ae_load_dir"):  # required by scripts of samplers, one of two ways to name a VQGAN in the others
        names = names_of("autoencoder")
        yield Load("ae_load_dir", values["ae_load_dir"], values["ae_load_step"], names, names)
    trains = "load_optim" not in idle  # then --load_dir is where the run begins; otherwise it is what is measured
    model: set[str] = set()
    if values["load_step"] and not (trains and continues(values)):
        names = names_of("sampler") if family == "sampler" else names_of("autoencoder", "discriminator")
        # What both training and sampling depend on is as it was trained, unless the command line says otherwise.
        model = {*names, *(set(names_of("training")) & set(names_of("sampling")))}
        # Another quantizer may have the same tensors; otherwise, loading them fails.
        binding = [name for name in names if name != "quantizer"]
        yield Load("load_dir", values["load_dir"], values["load_step"], model, binding)
    if values["resume"] and "resume" not in idle:
        new = names_of("place", "request", "dashboard", *(() if trains else ("origin",)))
        binding = [name for name in names_of(*ARCHITECTURE, "data") if name not in model]
        yield Load("resume", values["log_dir"], None, set(flags) - set(new) - model, binding)


def loaded_values(
    values: Values, given: Values, family: str, flags: Mapping[str, Flag], idle: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the models that this command loads were trained with. Neither the command line nor another of the models
    may contradict their architecture. Returns (values, those of them that a resumed run did not record because an
    earlier version started it)."""
    result: dict[str, Any] = {}
    loaded_from: dict[str, Load] = {}
    older: dict[str, Any] = {}
    for load in loads(values, family, flags, idle):
        saved = sources.saved_config(load.folder, flags, load.step)
        if saved is None:
            continue
        missing = {k: flag.older(saved) for k, flag in flags.items() if "older" in flag.meta and k not in saved}
        if load.option == "resume":
            older = {k: v for k, v in missing.items() if v != flags[k].default}
            if ("sampler" in saved) != (family == "sampler"):
                raise UsageError(f"--resume: logs/{load.folder} is not a run of this script: give another --log_dir")
        if load.option == "ae_load_dir":
            require_codes(load, saved)
        for key in load.binding:
            mine, theirs = given.get(key), saved.get(key)
            if key not in idle and mine != theirs and None not in (mine, theirs):
                raise UsageError(
                    f"--{key} {shown(mine)} contradicts {load}, which was trained with --{key} {shown(theirs)}"
                )
        takes = set(load.takes)
        if "train_steps" in idle and sources.same_images(saved, values):
            takes.update(names_of("images"))  # measured against the images that it was trained on
        taken = {k: v for k, v in {**missing, **saved}.items() if k in takes and k in flags}
        for key in names_of(*ARCHITECTURE):
            if key in taken and result.get(key, taken[key]) != taken[key]:
                raise UsageError(
                    f"{load} and {loaded_from[key]} do not belong together: --{key} {shown(taken[key])} and "
                    f"{shown(result[key])}"
                )
        result.update(taken)
        loaded_from.update(dict.fromkeys(taken, load))
    return result, older


def require_codes(load: Load, saved: Values) -> None:
    """UsageError if an autoencoder is loaded from a step before its quantizer has placed its codes."""
    for flag in config.ALL_FLAGS:
        placed = saved.get(flag.name, 0) if "codes_from" in flag.meta and flag.works(saved) else 0
        if load.step is not None and load.step < placed:
            raise UsageError(
                f"--ae_load_step {load.step}: logs/{load.folder} puts its codes in place at step {placed} "
                f"(--{' '.join(flag.needs)}); before that it has none"
            )
