"""The rank of this process in its job, from torchrun's environment variables, and the folder that holds logs/ and the
caches. Standard library only."""

import contextlib
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT_VARIABLE = "UNLEASHING_ROOT"


def from_here(path: str | Path) -> str:
    """A path relative to the current folder if it is below this folder, else unchanged."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):  # on another drive; the current folder was removed
        return str(path)
    return str(path) if relative.split(os.sep)[0] == os.pardir else relative


def _find_root() -> Path:
    """The folder that the environment names, else the current one if it holds logs/ or datasets.yaml, else the
    repository."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(from_here(os.path.expanduser(named)))
    if os.path.isdir("logs") or os.path.isfile("datasets.yaml"):
        return Path()
    return Path(from_here(REPOSITORY))


ROOT = _find_root()  # Path() if it is the current folder, so that the paths below it stay short
IS_HERE = Path() == ROOT
LOGS, LATENTS, FEATURES, PACKED = (ROOT / name for name in ("logs", "latents", "features", "packed"))


def in_root(path: str) -> str:
    """A path of datasets.yaml or of a saved configuration -> the same path relative to the current folder. Relative
    paths in these files start at the root."""
    return path if IS_HERE or path.startswith("~") else os.path.join(ROOT, path)


def from_root(path: str) -> str:
    """A path relative to the root if it is below the root, else unchanged. The keys of caches use such
    paths, so that the keys do not depend on the current folder."""
    return path if IS_HERE else path.removeprefix(os.path.join(ROOT, ""))


def recorded(path: str) -> str:
    """A path that a user typed -> its form in a saved configuration: absolute unless the root is the current folder."""
    return path if IS_HERE else os.path.abspath(os.path.expanduser(path))


def describe_root() -> str | None:
    """One line that says which folder is the root and why; None if the root is the current folder."""
    if IS_HERE:
        return None
    named = os.environ.get(ROOT_VARIABLE)
    reason = f"{ROOT_VARIABLE} names it" if named else "the current folder has no logs/ and no datasets.yaml"
    return f"logs/, caches and datasets.yaml are those of {ROOT}: {reason}"


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """The number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True in the one process that writes, logs and sends to the dashboard."""
    return rank() == 0


def first_to_report() -> bool:
    """Whether no other process of the job has reported an error on this machine (since torchrun's last restart).

    Often all processes have the same error at the same time. If one process ends, the others lose their connection to
    this process. Therefore only the first process with an error reports it.
    """
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <a folder for each start>/<local rank>/error.json
    if world_size() > 1 and record:
        with contextlib.suppress(OSError):  # not writable: all processes report
            reported = os.path.join(os.path.dirname(os.path.dirname(record)), "told")
            try:
                os.close(os.open(reported, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
    return True
