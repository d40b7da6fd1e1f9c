"""Finds the rank of this process and the root, which is the folder that holds logs/ and the caches. The rank is read
from torchrun's environment variables. This module imports the standard library only."""

import contextlib
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT_VARIABLE = "UNLEASHING_ROOT"


def from_here(path: str | Path) -> str:
    """Return a path relative to the current folder. A path outside the current folder is returned unchanged."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):  # the path is on another drive, or the current folder was removed
        return str(path)
    return str(path) if relative.split(os.sep)[0] == os.pardir else relative


def _find_root() -> Path:
    """Return the root. The root is the folder that the environment variable names. If the variable is not set, the root
    is the current folder if it holds logs/ or datasets.yaml, and otherwise the repository."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(from_here(os.path.expanduser(named)))
    if os.path.isdir("logs") or os.path.isfile("datasets.yaml"):
        return Path()
    return Path(from_here(REPOSITORY))


ROOT = _find_root()  # Path() for the current folder, so that the paths below ROOT are short
IS_HERE = Path() == ROOT
LOGS, LATENTS, FEATURES, PACKED = (ROOT / name for name in ("logs", "latents", "features", "packed"))


def in_root(path: str) -> str:
    """Convert a path from datasets.yaml or from a saved configuration. Relative paths in these files start at the root;
    the result starts at the current folder."""
    return path if IS_HERE or path.startswith("~") else os.path.join(ROOT, path)


def from_root(path: str) -> str:
    """Return a path relative to the root. A path outside the root is returned unchanged. Keys of caches contain such
    paths, so that the keys do not depend on the current folder."""
    return path if IS_HERE else path.removeprefix(os.path.join(ROOT, ""))


def recorded(path: str) -> str:
    """Convert a path that a user typed to its form in a saved configuration. If the root is not the current folder, the
    path becomes absolute."""
    return path if IS_HERE else os.path.abspath(os.path.expanduser(path))


def describe_root() -> str | None:
    """Return one line that names the root and the reason. Return None if the root is the current folder."""
    if IS_HERE:
        return None
    named = os.environ.get(ROOT_VARIABLE)
    reason = f"{ROOT_VARIABLE} names it" if named else "the current folder has no logs/ and no datasets.yaml"
    return f"logs/, caches and datasets.yaml are those of {ROOT}: {reason}"


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return the rank of this process among the processes of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Return the number of the job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return True in the main process, which alone writes files, logs and sends to the dashboard."""
    return rank() == 0


def first_to_report() -> bool:
    """Return True if no other process of the job has reported an error on this machine since torchrun's last restart.

    Often all processes have the same error at the same time. If one process ends, the other processes fail, too,
    because they lose a connection. Therefore only the first process with an error prints the error.
    """
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")  # the path <folder of this start>/<local rank>/error.json
    if world_size() > 1 and record:
        with contextlib.suppress(OSError):  # if the folder is not writable, all processes report
            reported = os.path.join(os.path.dirname(os.path.dirname(record)), "told")
            try:
                os.close(os.open(reported, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
    return True
