"""Command lines to paste: what to run after a run, and how to resume it."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.core.checkpoint import LOGS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {name: f"{name}.py" for name in ("train_vqgan", "train_sampler")}
SCRIPTS["calc_approximate_ELBO"] = "experiments/calc_approximate_ELBO.py"


def python() -> str:
    """How this Python is called here: by a name that the shell finds, else by its path."""
    here = os.path.abspath(sys.executable)
    for name in ("python", "python3"):
        if os.path.abspath(shutil.which(name) or "") == here:
            return name
    return _from_here(here)


def _from_here(path: str | Path) -> str:
    """A path as seen from the current folder if it is below that, else as it is."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # on another drive
        return str(path)
    return str(path) if relative.startswith(os.pardir) else relative


def command(script: str, **flags: Any) -> str:
    """A command line as text. script: as seen from the repository; flags that are None or False are left out."""
    words = [python(), _from_here(ROOT / script)]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            text = str(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def new_name(name: str) -> str:
    """A --log_dir that does not exist yet: the name, with a number appended if necessary."""
    names = [name, *(f"{name}_{i}" for i in range(2, 1000))]
    return next((n for n in names if not (LOGS / n).exists()), name)


def _data(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: values.get(k) for k in ("dataset", "custom_dataset_path")}


def resume(script: str, values: Mapping[str, Any], **more: Any) -> str | None:
    """The command that continues a run, from its script's name and its hyperparameters {flag: value}; the rest is in
    its config.json. None if the script cannot resume."""
    if script not in SCRIPTS:
        return None
    names = ["dataset", "custom_dataset_path", "log_dir"]
    if script != "train_vqgan":
        names += ["sampler", "ae_load_dir", "ae_load_step"]
    if script == "calc_approximate_ELBO":
        names += ["load_dir", "load_step"]
    flags = {name: values.get(name) for name in names} | dict(resume=True, train_steps=values.get("train_steps"))
    return command(SCRIPTS[script], **(flags | more))


def show_run(H: Any) -> str:
    """The command that makes a run's page."""
    return command("experiments/show_run.py", log_dir=H.log_dir, no_visdom=H.no_visdom)


def after_vqgan(H: Any, step: int, train_steps: int) -> str:
    """Stage 2 on the codes of this stage 1. train_steps: of stage 2."""
    return command(
        "train_sampler.py",
        sampler="absorbing",
        **_data(vars(H)),
        log_dir=new_name(f"{H.log_dir}_absorbing"),
        ae_load_dir=H.log_dir,
        ae_load_step=step,
        train_steps=train_steps,
        **H.given("machine", "dashboard", "stages"),
    )


def after_sampler(H: Any, step: int, n_images: int) -> tuple[str, str]:
    """(samples, FID) of this stage 2. n_images: about how many there are to compare with; the paper: 50000 samples."""
    models = dict(
        sampler=H.sampler,
        **_data(vars(H)),
        ae_load_dir=H.ae_load_dir,
        ae_load_step=H.ae_load_step,
        load_dir=H.log_dir,
        load_step=step,
        **H.given("machine", "dashboard", "sampling"),
    )
    shows = getattr(H, "sample_type", None) != "mlm"
    samples = command(
        "experiments/get_samples.py", **models, log_dir=new_name(f"{H.log_dir}_samples"), n_sheets=1, show_steps=shows
    )
    n_samples = max(n for n in (1000, 10_000, 50_000) if n <= max(n_images, 1000))
    return samples, command("experiments/calc_FID.py", **models, log_dir=f"{H.log_dir}_FID", n_samples=n_samples)


def get_weights(name: str) -> str:
    """The command that fetches published weights."""
    return f"{command('experiments/get_weights.py')} {name}"
