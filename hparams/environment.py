"""Checks if this Python can run the program, and says how to start a Python that can."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from utils.core.errors import EXIT_USAGE, fail
from utils.core.job import REPOSITORY

OLDEST = (3, 11)
COMMON = ("torch", "numpy", "PIL", "yaml", "tqdm")  # every script that uses a model imports these packages
NAMES = {"torch": "PyTorch", "PIL": "Pillow", "yaml": "PyYAML"}


def require_packages(*packages: str) -> None:
    """Exit with code 2 and one line on stderr if this Python lacks one of these packages or is older than 3.11. The
    function imports no package, so a script can call the function before slow imports."""
    if sys.version_info < OLDEST:
        _refuse("is older than 3.11")
    for package in packages:
        if find_spec(package) is None:
            _refuse(f"has no {NAMES.get(package, package)}")


def _refuse(reason: str) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    fail(f"this Python ({sys.executable}, {version}) {reason}: {_remedy()}", EXIT_USAGE)


def _remedy() -> str:
    """Say how to start the Python of the environment .venv in the repository, or how to make this environment."""
    inside = Path.cwd() == REPOSITORY
    venv = Path(".venv") if inside else REPOSITORY / ".venv"
    activate = f"source {venv / ('Scripts' if os.name == 'nt' else 'bin') / 'activate'}"
    if any(venv.glob("[Ll]ib/**/site-packages/torch")):
        return f"run `{activate}`, then the same command with `python`"
    make = "make .venv/.ready" if inside else f"make -C {REPOSITORY} .venv/.ready"
    return f"run `{make}`, which makes an environment, and `{activate}` (without make or with conda: docs/training.md)"
