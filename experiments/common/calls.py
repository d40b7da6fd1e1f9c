"""Calls scripts as a user calls them. Each script runs in a process of its own, and its output is shown."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.core.manifests import Manifests


def run_script(words: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
    """Run a script, given by its path and its flags, and return its exit code.

    A signal is passed on to the script once. The function then waits until the script ends, because a training finishes
    its step and writes a checkpoint. Raises SystemExit if a signal ended the script.
    """
    # The script has a session of its own. Otherwise Ctrl-C would reach the script twice, which means "stop at once".
    process = subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, start_new_session=True)
    previous = {n: signal.signal(n, lambda n, _: process.send_signal(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    code = process.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if code < 0 or code > 128:
        sys.exit(code if code > 0 else 128 - code)
    return code


def environment() -> dict[str, str]:
    """Return the environment of this process, changed so that `python` is this Python. `source .venv/bin/activate` has
    the same effect. The commands that a script prints then begin with `python`."""
    return dict(os.environ, PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def finished(folder: Path, step: int) -> bool:
    """Say whether the run in a folder has a complete checkpoint of a step."""
    return Manifests(folder).manifest_path(step).is_file()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's stats.jsonl, in order."""
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(folder: Path, name: str) -> list[Any]:
    """Return the values of a curve in a run's stats.jsonl, in order."""
    return [row[name] for row in rows(folder) if name in row]
