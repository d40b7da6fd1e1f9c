"""Reads JSON files that may be damaged or hostile. (The folder of a run may come from another person.) This module
imports the standard library only."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.core.errors import DamagedFile

MOST_NESTED = 20  # the most levels of lists and dicts within each other
MOST_BYTES = 64 << 20  # the largest size of a file


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError if the text is not JSON, or if the value has more than
    MOST_NESTED levels. This program writes fewer levels. More levels could make printing and hashing fail, because both
    are recursive."""
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    else:
        if text.count("[") + text.count("{") <= MOST_NESTED:  # this quick test accepts the lines of a long run
            return value
        level = [value]
        for _ in range(MOST_NESTED + 1):
            level = [child for item in level for child in _children(item)]
            if not level:
                return value
    raise ValueError(f"a value is nested more than {MOST_NESTED} levels deep")


def _children(value: Any) -> Iterable:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises DamagedFile if parse_json() refuses the text, or if the path is not a regular file."""
    try:
        with open(path, encoding="utf-8", opener=without_waiting) as f:
            found = os.fstat(f.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
                raise ValueError(f"it is not a regular file of at most {MOST_BYTES >> 20} MiB")
            return parse_json(f.read())
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: not readable as JSON ({error})") from None


def without_waiting(name: str, flags: int) -> int:
    """Open a path without waiting. A pipe would otherwise wait for its other end. Windows has no such pipes."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def hash_json(value: Any) -> str:
    """Return a short hex digest of any JSON value. Names of cache files contain such digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
