"""Reads single files of a run (curves, bars, pictures), which may be damaged or hostile. This module does not import
torch."""

import math
import os
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from utils.core.errors import DamagedFile, printable
from utils.core.files import parse_json, read_json
from utils.display.curves import VALIDATION

LONGEST = 1 << 20  # the most characters of a line
PICTURE = re.compile(r"(?P<name>[^/]+)_(?P<step>\d{1,18})\.png")
PART = re.compile(r".+_\d+_\d+\.png")  # --save_individually writes files <name>_<step>_<i>.png


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:
        return False


def read_rows(path: str) -> tuple[list[dict[str, Any]], int]:
    """Return (dicts of a .jsonl file, number of lines that are not dicts). Return ([], 0) if the file does not
    exist."""
    rows: list[dict[str, Any]] = []
    damaged = 0
    if not os.path.isfile(path):
        return rows, damaged
    with open(path, encoding="utf-8", errors="replace") as f:
        while line := f.readline(LONGEST):  # a longer line is read in parts, and the parts count as damaged lines
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                damaged += bool(line.strip())
    return rows, damaged


def read_steps(path: str) -> tuple[list[dict[str, Any]], int]:
    """Return (rows of stats.jsonl or speed.jsonl, number of damaged lines). Each row has a step."""
    rows, damaged = read_rows(path)
    good = [row for row in rows if type(row.get("step")) is int and is_number(row["step"])]
    return good, damaged + len(rows) - len(good)


def curves_of(row: dict[str, Any]) -> dict[str, float]:
    """Convert a row of stats.jsonl to the dashboard's curves {window/trace: value}. Training and validation share a
    window. Standard errors are left out."""
    curves = {}
    for name, value in row.items():
        if is_number(value) and name not in ("step", "images") and not name.endswith("_se"):
            trace = VALIDATION if name.startswith("val_") else "train"
            # visdom's server fails at names that are not Unicode.
            curves[f"{printable(name.removeprefix('val_'))}/{trace}"] = value
    return curves


def curve_rows(path: str) -> list[dict[str, float]]:
    """Return the curves in a stats.jsonl. The result has a dict for each row, with its step and curves_of(row). Damaged
    lines are skipped."""
    return [dict(step=row["step"], **curves_of(row)) for row in read_steps(path)[0]]


def read_bars(path: str) -> dict[str, dict[str, Any]]:
    """Return {name: dict(step, values, x, xlabel, ylabel)} from bars.json, without damaged entries.

    Raises DamagedFile if the file is not a JSON object.
    """
    if not os.path.isfile(path):
        return {}
    bars = read_json(path)
    if not isinstance(bars, dict):
        raise DamagedFile(f"{path} is damaged: not the bars that were written")
    return {printable(name): bar for name, bar in bars.items() if _is_bar(bar)}


def _is_bar(bar: Any) -> bool:
    if not isinstance(bar, dict) or not is_number(bar.get("step")):
        return False
    values, x = bar.get("values"), bar.get("x")
    if not isinstance(values, list) or not values or not all(v is None or is_number(v) for v in values):
        return False
    if x is None:
        return True
    return isinstance(x, list) and len(x) == len(values) and all(isinstance(v, str) or is_number(v) for v in x)


def _picture_files(folder: str) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of each picture in a folder, sorted by name. The single images of --save_individually are left
    out. Pipes are left out because a pipe would block. Links are left out because a link could lead to any file."""
    if not os.path.isdir(folder):
        return
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        is_regular = os.path.isfile(path) and not os.path.islink(path)
        if is_regular and name.endswith((".png", ".gif")) and not PART.fullmatch(name):
            yield name, path


def pictures_by_step(folder: str) -> dict[str, list[tuple[int, str]]]:
    """Return the pictures <name>_<step>.png of a folder as {name: [(step, path), ...]}, sorted by step."""
    found: dict[str, list[tuple[int, str]]] = {}
    for entry, path in _picture_files(folder):
        if match := PICTURE.fullmatch(entry):
            found.setdefault(match["name"], []).append((int(match["step"]), path))
    return {name: sorted(pictures) for name, pictures in found.items()}


def pictures_without_step(folder: str) -> dict[str, str]:
    """Return the pictures of a folder that have no step in their name, as {file name: path}. (Pictures of experiments
    have no step.)"""
    return {name: path for name, path in _picture_files(folder) if not PICTURE.fullmatch(name)}
