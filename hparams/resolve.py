"""Resolves the command line to one complete configuration.

Precedence: default < preset < the data set's own hparams < saved configuration of a loaded model < command line.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hparams import config, sources
from hparams.checks import check, derive, notes, shown, usual_workers
from hparams.config import ARCHITECTURE, Flag, Values, names_of
from hparams.environment import COMMON, require_packages
from hparams.parser import build_parser
from utils.core.errors import UsageError, quit_quietly_at_interrupt
from utils.core.job import is_main, recorded, world_size
from utils.core.manifests import Manifests

# For each kind of script, IGNORED has the roles of flags that the script ignores. HIDDEN has the roles of common flags
# that --help does not show.
IGNORED = {"vqgan": (), "sampler": ("vqgan", "discriminator")}
IGNORED["measures"] = (*IGNORED["sampler"], "training", "sampling")
# A loaded model also decides these flags if it was trained on the same images. Otherwise, validation images of one
# model could be training images of the other model.
OF_THE_SPLIT = set(names_of("images")) & {flag.name for flag in config.RECORDED}
HIDDEN = {"vqgan": (), "sampler": ("autoencoder",), "measures": (*ARCHITECTURE, "images", "stages")}

# These attributes of Hparams are no flags.
NOT_FLAGS = "explicit given_before data_entry script older chosen usual unknown sources changed".split()


class Hparams(SimpleNamespace):
    """The resolved configuration, with one attribute for each flag and the following ones.

    explicit: the flags that the command line gave. given_before: the flags that earlier commands of a resumed run gave.
    older: {name: setting} that a resumed run keeps from an earlier version. chosen: {flag: source} of the steps that
    the program chose. usual: {flag: value} without a command line and without a model. unknown: flags that the script
    ignores and that no loaded model has recorded. sources: {flag: source of its value}, "" for the default. changed:
    the flags of a resumed run that the command line changes, as text: "lr 1e-4 -> 1e-3".
    """

    def to_dict(self) -> dict[str, Any]:
        """Return {flag: value} as plain values, for config.json."""
        return {k: v for k, v in vars(self).items() if k not in NOT_FLAGS}

    def known(self) -> dict[str, Any]:
        """Return {flag: value} of the flags that this command or a loaded model has used. Flags that the command lines
        of this run gave come first."""
        given = {*self.explicit, *self.given_before}
        known = {k: v for k, v in self.to_dict().items() if k not in self.unknown}
        return dict(sorted(known.items(), key=lambda item: item[0] not in given))

    def given(self, *roles: str) -> dict[str, Any]:
        """Return {flag: value} of the flags on the command line that have one of these roles."""
        return {name: getattr(self, name) for name in names_of(*roles) if name in self.explicit}

    def repeated(self, *roles: str) -> dict[str, Any]:
        """Return {flag: value} for the command line of another script. The result has the flags with one of these roles
        that this command line, or an earlier one of the resumed run, gave."""
        result = {}
        for name in (name for name in names_of(*roles) if name in self.usual):
            value = getattr(self, name)
            if value is False and self.usual[name] is True:  # the other name of the flag switches it off
                result[name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"] = True
            elif name in self.explicit or value != self.usual[name]:
                result[name] = value
        return result


def get_hparams(
    family: str,
    description: str,
    argv: Sequence[str] | None = None,
    extra: Iterable[type] = (),
    reads: Iterable[str] = (),
    passes: Iterable[str] = (),
    settle: Callable[[Hparams], None] | None = None,
    reads_images: bool = True,
    epilog: str | None = None,
    script: str | None = None,
) -> Hparams:
    """Parse and resolve the command line of a script.

    family: 'vqgan' or 'sampler'. Only scripts that measure models use extra, reads, passes and settle. extra: config
    dataclasses with the script's own flags; reads: the flags of training and sampling that the script uses; passes: the
    flags that the script passes on to other scripts, without listing them in --help; settle: a function that gets the
    Hparams and sets the special values of the script. reads_images: whether the script reads the images of --dataset.
    Raises SystemExit(2) for bad input, after one line on stderr.
    """
    kind = "measures" if extra else family
    own = config.flags_of(extra)
    flags = own + config.flags_of(config.vqgan_family() if family == "vqgan" else config.sampler_family())
    idle = set(names_of(*IGNORED[kind])) - set(reads)
    common = set(names_of("common")) - set(names_of(*HIDDEN[kind]))
    shown = (common | set(reads)) - idle | {flag.name for flag in own}
    shown -= {flag.name for flag in flags if "advanced" in flag.roles}
    parser = build_parser(flags, description, epilog, shown)
    idle -= set(passes)
    given = parser.parse(argv)
    if argv is None:
        quit_quietly_at_interrupt()
        require_packages(*COMMON)
    try:
        sources.tell_root()
        H = resolve(flags, given, family, idle, reads_images)
        if settle:
            before = H.to_dict()
            settle(H)
            H.sources.update({k: "this script" for k, v in H.to_dict().items() if v != before.get(k)})
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
    """Merge the sources by precedence, derive the open values, and check all values.

    given: {flag: value} of the command line. idle: names of flags that the script ignores.
    """
    by_name = {flag.name: flag for flag in flags}
    every = by_name | {flag.name: flag for flag in config.RECORDED}
    trains = "load_optim" not in idle
    given = {name: sources.checked(by_name[name], value) for name, value in given.items()}
    given = {name: recorded(value) if name in names_of("path") else value for name, value in given.items()}
    entry = sources.dataset_entry(given["dataset"], given.get("custom_dataset_path"), reads_images)
    own = sources.own_hparams(entry, family, by_name)
    values = {name: flag.default for name, flag in every.items()} | own
    resumed = None  # the recorded configuration of a run that is resumed
    if (values | given)["resume"] and "resume" not in idle:
        resumed = recorded_by((values | given)["log_dir"], every)
    if trains:
        values |= origin(values | given, given, resumed or {})
    chosen = chosen_steps(values | given, given, resumed or {}, idle)
    values |= {name: step for name, (step, _) in chosen.items()} | given
    require_loaded(values, trains)
    models = [
        (load, resumed if load.option == "resume" else recorded_by(load.folder, every, load.step))
        for load in loads(values, family, every, idle)
    ]
    place, of_model = recorded_preset(models)
    preset = given.get("preset") or of_model or sources.preset_of(entry)
    usual = [
        ("", default_values(models, values, every)),
        (f"preset {preset}", sources.preset_values(preset, family)),
        (sources.file_of(entry), own),
    ]
    loaded = loaded_values(models, values, given, family, every, idle)
    known = {name for _, some in loaded for name in some}
    layers = [
        *usual,
        (place, dict(preset=of_model)),
        *((why, {name: step}) for name, (step, why) in chosen.items()),
        *loaded,
        ("command line", {k: v for k, v in given.items() if k not in known or k not in idle}),
    ]
    H = Hparams(**{name: copy.deepcopy(value) for _, some in layers for name, value in some.items()})
    H.sources = {name: place for place, some in layers for name in some}
    H.explicit, H.data_entry = sorted(given), entry
    H.given_before = sources.flags_given(H.log_dir) if H.resume and "resume" not in idle else []
    H.chosen = list(chosen)
    H.usual = {name: value for _, some in usual for name, value in some.items()}
    if H.usual["num_workers"] is None:
        H.usual["num_workers"] = usual_workers()
    H.unknown = sorted((set(idle) if trains else {*idle, "ema"} - given.keys()) - known)
    H.older, H.changed = of_resumed_run(models, given, every)
    before = H.to_dict()
    derive(H, by_name.values())
    H.sources.update({name: "derived" for name, value in H.to_dict().items() if value != before[name]})
    check(H, by_name.values(), idle)
    return H


def size_of_stage_2(H: Hparams) -> dict[str, int]:
    """Return {flag: value} for the size of stage 2 on the codes of this stage 1.

    The preset or the data set gives --train_steps; otherwise it is the number of stage 1. The result has --batch_size
    only if the processes of this job cannot share the default equally: the next larger number that they can share.
    """
    flags = {flag.name: flag for flag in config.ALL_FLAGS}
    values = sources.preset_values(H.preset or sources.preset_of(H.data_entry), "sampler")
    values |= sources.own_hparams(H.data_entry, "sampler", flags)
    size = dict(train_steps=values.get("train_steps", H.train_steps))
    if missing := -values["batch_size"] % world_size():
        size["batch_size"] = values["batch_size"] + missing
    return size


# ---------------------------------------------------------------------- loaded models


def manifests_of(name: str) -> Manifests:
    """Return the manifests of logs/<name>."""
    return Manifests(sources.run_folder(name))


def recorded_by(name: str, flags: Mapping[str, Flag], step: int | None = None) -> dict[str, Any] | None:
    """Return the configuration that logs/<name> recorded with a step (None: the newest). None if there is none."""
    folder = sources.run_folder(name)
    saved = sources.saved_config(folder, flags, step)
    if saved is None and manifests_of(name).steps() and is_main():
        gone = folder / "config.json"
        print(f"note: {gone} is gone: what the command line does not give has its default", file=sys.stderr)
    return saved


def continues(values: Values) -> bool:
    """Say whether --resume finds a checkpoint in --log_dir. values: {flag: value}."""
    return values["resume"] and bool(manifests_of(values["log_dir"]).steps())


def origin(values: Values, given: Values, saved: Values) -> dict[str, Any]:
    """Return load_dir, load_step and load_optim of a run that is resumed and that recorded `saved`. The recorded values
    are kept. A run without a checkpoint and without recorded values takes the values from the command line."""
    found = {name: saved[name] for name in names_of("origin") if name in saved}
    if not (found.get("load_step") or continues(values)):
        return {}
    began = f"at step {found['load_step']} of {found['load_dir']}" if found.get("load_step") else "afresh"
    other = any(given[name] != found.get(name) for name in ("load_dir", "load_step") if name in given)
    if other and (values["load_step"] or found.get("load_step")):
        words = " ".join(f"--{name} {given[name]}" for name in ("load_dir", "load_step") if name in given)
        raise UsageError(
            f"{words} contradicts --resume: logs/{values['log_dir']} began {began}: leave them out, or give another "
            "--log_dir"
        )
    return found


def chosen_steps(values: Values, given: Values, saved: Values, idle: Collection[str]) -> dict[str, tuple[int, str]]:
    """Return {flag: (step, source of the step)} for the models whose folder is given without a step. `saved`, the
    configuration of the resumed run, may have the step. Otherwise the newest complete step is taken. The step of the
    weights that training begins with must be given."""
    trains = "load_optim" not in idle
    wanted = [("ae_load_dir", "ae_load_step", "vqgan")] if values.get("ae_load_dir") else []
    if "load_dir" in given and not (trains and continues(values)):
        wanted.append(("load_dir", "load_step", values.get("sampler", "vqgan")))
    found = {}
    for option, name, model in wanted:
        folder = values[option]
        if values[name] or name in given:
            continue
        if saved.get(option) == folder and saved.get(name):
            found[name] = (saved[name], f"recorded by logs/{values['log_dir']}")
            continue
        steps = list(itertools.islice(manifests_of(folder).complete_steps(model), None if trains else 1))
        if name == "load_step" and trains:
            sources.require_folder(option, folder)
            raise UsageError(
                f"--{option} {folder} needs --{name}, the step to start from; steps of '{model}' in logs/{folder}: "
                f"{shown(steps[:20]) if steps else 'none'}"
            )
        if steps:
            found[name] = (steps[0], f"the newest complete step of '{model}' in logs/{folder}")
        elif not values["dry_run"] and (trains or "load_dir" in given):
            sources.require_folder(option, folder)
            raise UsageError(f"--{option} {folder}: logs/{folder} holds no complete checkpoint of '{model}'")
    return found


def require_loaded(values: Values, trains: bool) -> None:
    """Raise UsageError if a folder to load from does not exist. Without this check, the error for a mistyped folder
    would be about shapes. A script that measures may need no model, unless the command line names a checkpoint."""
    if values["dry_run"] or not (trains or values["load_step"]):
        return
    if values.get("ae_load_dir"):
        sources.require_folder("ae_load_dir", values["ae_load_dir"])
    if values["load_step"] and not (trains and continues(values)):
        sources.require_folder("load_dir", values["load_dir"])


@dataclass
class Load:
    """A run whose configuration is read.

    option: the flag that names the run; folder: the folder of the run; step: None for the newest step; takes: the flags
    that get their values from this configuration; binding: the flags that the command line may not contradict.
    """

    option: str
    folder: str
    step: int | None
    takes: Iterable[str]
    binding: Iterable[str]

    def __str__(self) -> str:
        return f"--{self.option}" if self.option == "resume" else f"--{self.option} {self.folder}"


def describing(option: str, family: str, idle: Collection[str]) -> set[str]:
    """Return the flags that only describe the training of the model of --<option>, and that the script does not
    read."""
    ignored = {*idle, "ema"} if "load_optim" in idle else set(idle)
    ignored -= set(names_of("place", "request", "origin", "dashboard"))
    if family == "vqgan":
        return ignored
    of_vqgan = ignored & set(names_of("vqgan", "discriminator"))
    return of_vqgan if option == "ae_load_dir" else ignored - of_vqgan


def loads(values: Values, family: str, flags: Iterable[str], idle: Collection[str]) -> Iterator[Load]:
    """Yield the runs that this command reads. A later run takes precedence over an earlier one."""
    trains = "load_optim" not in idle  # training starts from the run in --load_dir; other scripts measure this run
    if values.get(
        "ae_load_dir"
    ):  # only scripts of samplers require this flag, because --load_dir can also name a VQGAN
        names = names_of("autoencoder")
        takes = {*names, *describing("ae_load_dir", family, idle)}
        yield Load("ae_load_dir", values["ae_load_dir"], values["ae_load_step"], takes, names)
    model: set[str] = set()
    if values["load_step"] and not (trains and continues(values)):
        names = names_of("sampler") if family == "sampler" else names_of("autoencoder", "discriminator")
        # Flags with both roles, training and sampling, have the values of the training by default.
        model = {*names, *(set(names_of("training")) & set(names_of("sampling")))}
        model |= describing("load_dir", family, idle)
        # Another quantizer may have the same tensors. If the tensors differ, loading the checkpoint fails.
        binding = [name for name in names if name != "quantizer"]
        yield Load("load_dir", values["load_dir"], values["load_step"], model, binding)
    if values["resume"] and "resume" not in idle:
        new = names_of("place", "request", "dashboard", *(() if trains else ("origin",)))
        binding = [name for name in names_of(*ARCHITECTURE, "data") if name not in model]
        yield Load("resume", values["log_dir"], None, set(flags) - set(new) - model, binding)


Model = tuple[Load, dict[str, Any] | None]  # a run that is read, and its configuration, or None without a configuration


def default_values(models: Iterable[Model], values: Values, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Return the defaults of flags. A model without a configuration, such as a published one, has the paper's
    shapes."""
    defaults = {name: flag.default for name, flag in flags.items()}
    if any(saved is None and (load.option != "resume" or continues(values)) for load, saved in models):
        defaults.update((name, flags[name].older({})) for name in names_of("autoencoder"))
    return defaults


def recorded_preset(models: Iterable[Model]) -> tuple[str, str | None]:
    """Return (the flag that names a loaded model, the preset that the model's own command line chose). Return ("",
    None) if there is no such preset. A resumed run takes precedence over the other models, even if it recorded no
    preset."""
    result: tuple[str, str | None] = "", None
    for load, saved in models:
        if saved is not None and (load.option == "resume" or "preset" in saved):
            result = str(load), saved.get("preset")
    return result


def loaded_values(
    models: Iterable[Model],
    values: Values,
    given: Values,
    family: str,
    flags: Mapping[str, Flag],
    idle: Collection[str],
) -> list[tuple[str, dict[str, Any]]]:
    """Return the values that the loaded models were trained with, as a list of (flag that names the model, {flag:
    value}). Raise UsageError if the command line or another loaded model contradicts the architecture of a model."""
    layers: list[tuple[str, dict[str, Any]]] = []
    for load, saved in models:
        if saved is None:
            continue
        if load.option == "resume" and ("sampler" in saved) != (family == "sampler"):
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
        if sources.same_images(saved, values):  # the model was trained on the images of this command
            takes.update(names_of("images") if "train_steps" in idle else OF_THE_SPLIT)
        taken = {k: v for k, v in (unrecorded(saved, flags) | saved).items() if k in takes and k in flags}
        for place, others in layers:
            for key in names_of(*ARCHITECTURE):
                if key in taken and key not in idle and others.get(key, taken[key]) != taken[key]:
                    raise UsageError(
                        f"{load} and {place} do not belong together: --{key} {shown(taken[key])} and "
                        f"{shown(others[key])}"
                    )
        layers.append((str(load), taken))
    return layers


def unrecorded(saved: Values, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Return {flag: value} for the flags that a configuration lacks because an earlier version wrote the file."""
    return {k: flag.older(saved) for k, flag in flags.items() if "older" in flag.meta and k not in saved}


def of_resumed_run(
    models: Iterable[Model], given: Values, flags: Mapping[str, Flag]
) -> tuple[dict[str, Any], list[str]]:
    """Return two results for a resumed run: {flag: value} that the run keeps from an earlier version, and a list of the
    changes that the command line makes, as text."""
    older: dict[str, Any] = {}
    changed: list[str] = []
    for load, saved in models:
        if load.option != "resume" or saved is None:
            continue
        if given.get("preset") not in (None, saved.get("preset")):
            raise UsageError(
                f"--preset {given['preset']} contradicts --resume: logs/{load.folder} keeps the values that it "
                "began with: leave --preset out and give only the flags that you want to change, or give another "
                "--log_dir"
            )
        missing = unrecorded(saved, flags)
        older = {k: v for k, v in missing.items() if v != flags[k].default and flags[k].works(saved) and k not in given}
        known = missing | saved
        for key, value in given.items():
            if key in load.takes and key in known and known[key] != value:
                changed.append(f"{key} {shown(known[key])} -> {shown(value)}")
    return older, changed


def require_codes(load: Load, saved: Values) -> None:
    """Raise UsageError if an autoencoder is loaded from a step at which its quantizer had no codes yet."""
    for flag in config.ALL_FLAGS:
        placed = saved.get(flag.name, 0) if "codes_from" in flag.meta and flag.works(saved) else 0
        if load.step is not None and load.step < placed:
            raise UsageError(
                f"--ae_load_step {load.step}: logs/{load.folder} puts its codes in place at step {placed} "
                f"(--{' '.join(flag.needs)}); before that it has none"
            )
