"""Reads single files of a run: curves, bars, pictures. The files may be damaged or hostile. torch is not needed."""

import math
import os
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from utils.core.errors import DamagedFile, printable
from utils.core.files import parse_json, read_json
from utils.display.curves import VALIDATION

LONGEST = 1 << 20  # characters of a line
PICTURE = re.compile(r"(?P<name>[^/]+)_(?P<step>\d{1,18})\.png")
PART = re.compile(r".+_\d+_\d+\.png")  # files of --save_individually: <name>_<step>_<i>.png


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:
        return False


def read_rows(path: str) -> tuple[list[dict[str, Any]], int]:
    """(dicts of a .jsonl file, number of lines that are not dicts). ([], 0) if the file does not exist."""
    rows: list[dict[str, Any]] = []
    damaged = 0
    if not os.path.isfile(path):
        return rows, damaged
    with open(path, encoding="utf-8", errors="replace") as f:
        while line := f.readline(LONGEST):  # a longer line is read in parts, which are damaged rows
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
    """(rows of stats.jsonl or speed.jsonl, the number of damaged lines). Each row has a step."""
    rows, damaged = read_rows(path)
    good = [row for row in rows if type(row.get("step")) is int and is_number(row["step"])]
    return good, damaged + len(rows) - len(good)


def curves_of(row: dict[str, Any]) -> dict[str, float]:
    """A row of stats.jsonl -> the dashboard's curves {window/trace: value}. Training and validation share a window.
    Standard errors are left out."""
    curves = {}
    for name, value in row.items():
        if is_number(value) and name not in ("step", "images") and not name.endswith("_se"):
            trace = VALIDATION if name.startswith("val_") else "train"
            # visdom's server fails at names that are not Unicode.
            curves[f"{printable(name.removeprefix('val_'))}/{trace}"] = value
    return curves


def curve_rows(path: str) -> list[dict[str, float]]:
    """The curves in a stats.jsonl: for each row a dict of its step and curves_of(row). Damaged lines are skipped."""
    return [dict(step=row["step"], **curves_of(row)) for row in read_steps(path)[0]]


def read_bars(path: str) -> dict[str, dict[str, Any]]:
    """{name: dict(step, values, x, xlabel, ylabel)} of bars.json, without damaged entries.

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
    """(name, path) of a folder's pictures, sorted by name, without the single images of --save_individually. Pipes are
    left out because they would block, and links because they could lead to any file."""
    if not os.path.isdir(folder):
        return
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        is_regular = os.path.isfile(path) and not os.path.islink(path)
        if is_regular and name.endswith((".png", ".gif")) and not PART.fullmatch(name):
            yield name, path


def pictures_by_step(folder: str) -> dict[str, list[tuple[int, str]]]:
    """The pictures <name>_<step>.png of a folder: {name: [(step, path), ...]} by rising step."""
    found: dict[str, list[tuple[int, str]]] = {}
    for entry, path in _picture_files(folder):
        if match := PICTURE.fullmatch(entry):
            found.setdefault(match["name"], []).append((int(match["step"]), path))
    return {name: sorted(pictures) for name, pictures in found.items()}


def pictures_without_step(folder: str) -> dict[str, str]:
    """The pictures of a folder without a step in their name, such as those of experiments: {file name: path}."""
    return {name: path for name, path in _picture_files(folder) if not PICTURE.fullmatch(name)}
