"""Reads what a run has written: curves, bars, pictures. The files are not trusted, and torch is not needed."""

import math
import os
import re

from utils.core.errors import DamagedFile, printable
from utils.core.files import parse_json, read_json

LONGEST = 1 << 20  # characters of a line
PICTURE = re.compile(r"(?P<name>[^/]+)_(?P<step>\d{1,18})\.png")


def is_number(value):
    """Whether a JSON value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:
        return False


def read_rows(path):
    """(dicts of a .jsonl file, number of its lines that are not dicts). Empty if there is no such file."""
    rows, damaged = [], 0
    if not os.path.isfile(path):
        return rows, damaged
    with open(path, encoding="utf-8", errors="replace") as f:
        while line := f.readline(LONGEST):  # of a longer one the parts count as lines: none of them is a row
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                damaged += bool(line.strip())
    return rows, damaged


def read_curves(path):
    """(rows of stats.jsonl or speed.jsonl by step, how many lines are damaged)."""
    rows, damaged = read_rows(path)
    good = [row for row in rows if type(row.get("step")) is int and is_number(row["step"])]
    return good, damaged + len(rows) - len(good)


def curves_of(row):
    """A row of stats.jsonl -> the dashboard's curves; training and validation share a window. Standard errors have
    none."""
    numbers = {k: v for k, v in row.items() if is_number(v) and k not in ("step", "images") and not k.endswith("_se")}
    numbers = {printable(k): v for k, v in numbers.items()}  # visdom's server fails at names that are not Unicode
    return {
        f"{k.removeprefix('val_')}/{'validation' if k.startswith('val_') else 'train'}": v for k, v in numbers.items()
    }


def curve_rows(path):
    """The curves in a stats.jsonl: for each row a dict of its step and curves_of(row). Damaged lines are skipped."""
    return [dict(step=row["step"], **curves_of(row)) for row in read_curves(path)[0]]


def read_bars(path):
    """{name: dict(step, values, x, xlabel, ylabel)} of bars.json, without damaged entries.

    Raises DamagedFile if the file is not a JSON object.
    """
    if not os.path.isfile(path):
        return {}
    bars = read_json(path)
    if not isinstance(bars, dict):
        raise DamagedFile(f"{path} is damaged: not the bars that were written")
    return {printable(name): bar for name, bar in bars.items() if _is_bar(bar)}


def _is_bar(bar):
    if not isinstance(bar, dict) or not isinstance(bar.get("values"), list) or not is_number(bar.get("step")):
        return False
    x = bar.get("x")
    return (
        bool(bar["values"])
        and all(v is None or is_number(v) for v in bar["values"])
        and (
            x is None
            or (
                isinstance(x, list)
                and len(x) == len(bar["values"])
                and all(isinstance(v, str) or is_number(v) for v in x)
            )
        )
    )


def is_regular(path):
    """Whether a path is a regular file: not a pipe, which would block, and not a link, which could lead anywhere."""
    return os.path.isfile(path) and not os.path.islink(path)


def pictures_by_step(folder):
    """The pictures <name>_<step>.png of a folder: {name: [(step, path), ...]} by rising step."""
    found = {}
    for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        match = PICTURE.fullmatch(entry)
        # With --save_individually there is <name>_<step>_<i>.png, too: parts of pictures.
        path = os.path.join(folder, entry)
        if match and not PICTURE.fullmatch(f"{match['name']}.png") and is_regular(path):
            found.setdefault(match["name"], []).append((int(match["step"]), path))
    return {name: sorted(pictures) for name, pictures in found.items()}
