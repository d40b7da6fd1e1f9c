"""Makes command lines that the user can paste. They resume a run, or do the next step after a run."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from utils.core import job
from utils.core.job import LOGS, REPOSITORY, from_here, in_root

SCRIPTS = {name: f"{name}.py" for name in ("train_vqgan", "train_sampler")}
SCRIPTS["calc_approximate_ELBO"] = "experiments/calc_approximate_ELBO.py"
ALONE = ("experiments/show_run.py", "experiments/get_weights.py")  # scripts that always run in one process
PORT = 29500  # the port of torchrun's rendezvous between several machines


def python() -> str:
    """Return the word that starts this Python. The word is a name if the shell finds this name, and otherwise the
    path."""
    here = os.path.abspath(sys.executable)
    for name in ("python", "python3"):
        if _is_beside_python(name) and os.path.samefile(str(shutil.which(name)), here):
            return name
    return from_here(here)


def _is_beside_python(name: str) -> bool:
    """Return whether the shell finds this program in the folder of this Python."""
    found = shutil.which(name)
    return bool(found) and os.path.samefile(os.path.dirname(str(found)), os.path.dirname(sys.executable))


def launcher() -> list[str]:
    """Return the words that start a script in the same way as this script. The words are python, or torchrun with the
    same number of processes."""
    if job.world_size() == 1:
        return [python()]
    torchrun = ["torchrun"] if _is_beside_python("torchrun") else [python(), "-m", "torch.distributed.run"]
    machines = job.world_size() // job.local_size()
    if machines == 1:
        return [*torchrun, "--standalone", "--nproc_per_node", str(job.local_size())]
    first = f"{os.environ.get('MASTER_ADDR', 'node0')}:{PORT}"
    processes = ["--nnodes", str(machines), "--nproc_per_node", str(job.local_size())]
    return [*torchrun, *processes, "--rdzv_backend", "c10d", "--rdzv_endpoint", first]


def command(script: str, **flags: Any) -> str:
    """Return a command line as text. script: the path relative to the repository. Flags whose value is None or False
    are left out."""
    words = [*([python()] if script in ALONE else launcher()), from_here(REPOSITORY / script)]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            text = str(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def new_name(name: str) -> str:
    """Return a --log_dir that does not exist yet. If the name is in use, a number is appended."""
    names = [name, *(f"{name}_{i}" for i in range(2, 1000))]
    return next((n for n in names if not (LOGS / n).exists()), name)


def _data(values: Mapping[str, Any]) -> dict[str, Any]:
    path = values.get("custom_dataset_path")
    return dict(dataset=values.get("dataset"), custom_dataset_path=path and in_root(path))


def resume(script: str, values: Mapping[str, Any], **more: Any) -> str | None:
    """Return the command that continues a run, or None if the script cannot resume. script: the name of the run's
    script. values: {flag: value} of the run's hyperparameters. The command omits most flags, because config.json holds
    them."""
    if script not in SCRIPTS:
        return None
    names = ["log_dir"]
    if script != "train_vqgan":
        names += ["sampler", "ae_load_dir", "ae_load_step"]
    if script == "calc_approximate_ELBO":
        names += ["load_dir", "load_step"]
    flags = _data(values) | {k: values.get(k) for k in names} | dict(resume=True, train_steps=values.get("train_steps"))
    return command(SCRIPTS[script], **(flags | more))


def show_run(name: str) -> str:
    """Return the command that writes the report of logs/<name>."""
    return command("experiments/show_run.py", log_dir=name, no_visdom=True)


def after_vqgan(H: Any, step: int, **size: int) -> str:
    """Return the command that trains stage 2 on the codes of this stage 1. size: flags of stage 2, such as
    train_steps."""
    return command(
        "train_sampler.py",
        sampler="absorbing",
        **_data(vars(H)),
        log_dir=new_name(f"{H.log_dir}_absorbing"),
        ae_load_dir=H.log_dir,
        ae_load_step=step,
        **size,
        **H.repeated("machine", "dashboard", "stages"),
    )


def _models(H: Any, load_dir: str, load_step: int) -> dict[str, Any]:
    pair = dict(ae_load_dir=H.ae_load_dir, ae_load_step=H.ae_load_step, load_dir=load_dir, load_step=load_step)
    return dict(sampler=H.sampler, **_data(vars(H)), **pair)


def draw_samples(H: Any, log_dir: str, **flags: Any) -> str:
    """Return the command that draws a sheet of samples with the models of H and these flags of sampling."""
    models = _models(H, H.load_dir, H.load_step)
    flags = H.repeated("machine", "dashboard", "sampling") | flags
    return command("experiments/get_samples.py", **models, log_dir=new_name(log_dir), n_sheets=1, **flags)


def after_sampler(H: Any, step: int, n_images: int, extractor: str | None = None) -> tuple[str, str]:
    """Return (command that draws samples, command that computes the FID) for this stage 2. n_images: the approximate
    number of training images. The paper uses 50000 samples. extractor: the network of the FID, unless Inception."""
    models = _models(H, H.log_dir, step) | H.repeated("machine", "dashboard", "sampling")
    # get_samples.py refuses --show_steps for these.
    shows = H.sampler != "absorbing" or not (H.sample_type == "mlm" or H.remask_eta)
    samples = command(
        "experiments/get_samples.py", **models, log_dir=new_name(f"{H.log_dir}_samples"), n_sheets=1, show_steps=shows
    )
    n_samples = max(n for n in (1000, 10_000, 50_000) if n <= max(n_images, 1000))
    more = dict(log_dir=f"{H.log_dir}_FID", n_samples=n_samples, extractor=extractor)
    return samples, command("experiments/calc_FID.py", **models, **more)


def get_weights(name: str) -> str:
    """Return the command that fetches published weights."""
    return f"{command('experiments/get_weights.py')} {name}"
