"""Reads a run's folder, which may contain damaged or hostile files. Damaged files are noted and skipped."""

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from utils.core.checkpoint import LOGS, Checkpoints
from utils.core.errors import DamagedFile, printable
from utils.core.files import read_json
from utils.display import run_files
from utils.display.grids import TRIPLES_CAPTION, open_picture, write_strips
from utils.display.run_files import is_number

LARGEST = 1600  # the most pixels of the longer side of a picture
MOST_PICTURES = 24  # the most series of pictures, and also the most pictures without a step in their name
MOST_CURVES = 100  # a curve takes 50 ms to draw, and 17 KB of the page
MOST_BARS = 24
MOST_ROWS = 10_000  # the most rows with equal names, because more points of a curve are not visible
CAPTIONS = dict(
    reconstructions=TRIPLES_CAPTION,
    codebook="the mean of the pixels where each code is used; most used codes first",
    denoising="samples while they are drawn, by the completed share of sampling",
)
# An experiment records its own values of these flags. In a report they would look like values of the model.
OF_EXPERIMENT = ("amp", "amp_dtype", "batch_size", "compile", "steps_per_eval")
LAST_LINES = 60  # the number of lines of log.txt that are shown
LAST_BYTES = 1 << 16  # the number of bytes of log.txt that are read

Row = dict[str, Any]


class Picture(NamedTuple):
    """A picture file. name: the name of the file without the step."""

    name: str
    caption: str
    path: str


class SavedRun:
    """Holds the contents of a run's folder. The list `notes` has a sentence for each damaged or skipped file."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.notes: list[str] = []
        self.name = os.path.relpath(self.folder, LOGS)
        self.images = os.path.join(self.folder, "images")
        config = _dict(self._read("config.json", read_json, {}))
        self.script = str(config.get("script", ""))
        self.hparams, self.facts = _dict(config.get("hparams")), _dict(config.get("facts"))
        given = config.get("given")
        self.given = [str(name) for name in given] if isinstance(given, list) else []
        self.rows = self._read_lines("stats.jsonl", run_files.read_steps)
        self.speed = self._read_lines("speed.jsonl", run_files.read_steps)
        metrics = self._read_lines("metrics.jsonl", run_files.read_rows)
        self.metrics = [row for row in metrics if isinstance(row.get("values"), dict)]
        self.bars = self._first(self._read("bars.json", run_files.read_bars, {}), MOST_BARS, "bar plots")
        self.curves = self._curves()
        self.log = self._read("log.txt", _last_lines, [])
        self.steps = Checkpoints(self.folder).steps()

    def note(self, text: str) -> None:
        if printable(text) not in self.notes:
            self.notes.append(printable(text))

    def _read(self, name: str, read: Callable[[str], Any], default: Any) -> Any:
        """Return read(path) for a file of this folder. If the file is missing or damaged, return the default."""
        path = os.path.join(self.folder, name)
        if os.path.islink(path):  # the link could lead to a private file
            self.note(f"{name} is a symbolic link; it is passed over")
            return default
        try:
            return read(path) if os.path.isfile(path) else default
        except (DamagedFile, OSError) as error:
            self.note(f"{error}; it is passed over")
            return default

    def _read_lines(self, name: str, read: Callable[[str], tuple[list[Row], int]]) -> list[Row]:
        rows, damaged = self._read(name, read, ([], 0))
        if damaged:
            self.note(f"{damaged} damaged line{'s' if damaged > 1 else ''} of {name} passed over")
        return rows

    def _first(self, named: Row, most: int, what: str) -> Row:
        """Return the first `most` entries of a dict. If the dict has more entries, add a note with their number."""
        if len(named) > most:
            self.note(f"the first {most} of {len(named):,} {what} are shown")
        return dict(itertools.islice(named.items(), most))

    def _curves(self) -> list[dict[str, float]]:
        """Return the rows of losses and speed, sorted by step. Each row is a dict with 'step' and names as on the
        dashboard. Values that are always 0, such as a loss whose weight is 0, are left out."""
        speed = [{printable(name): v for name, v in row.items() if is_number(v)} for row in _thinned(self.speed)]
        rows = [dict(step=row["step"], **run_files.curves_of(row)) for row in _thinned(self.rows)] + speed
        rows.sort(key=lambda row: row["step"])
        windows = {name.partition("/")[0] for row in rows for name, value in row.items() if value}
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        names = {name: None for name in names if name.partition("/")[0] in windows}
        shown = {"step", *self._first(names, MOST_CURVES, "curves")}
        return [{name: value for name, value in row.items() if name in shown} for row in rows]

    def draw_strips(self) -> None:
        """Draw the strips of progress again, if the folder is writable."""
        try:
            write_strips(self.images, self.note)
        except OSError as error:
            self.note(f"the strips of progress could not be written: {error.strerror}")

    def is_empty(self) -> bool:
        return not (self.rows or self.metrics or self.bars or self.steps or self.pictures())

    def last_step(self) -> int:
        """The last known step."""
        return max([0, *(row["step"] for row in self.rows[-1:]), *self.steps[-1:]])

    def traces(self) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
        """Return {window: {trace: (steps, values)}}. If a step was recorded twice, the later line counts."""
        windows: dict[str, dict[str, dict[float, float]]] = {}
        for row in self.curves:
            for name, value in row.items():
                if name != "step":
                    window, _, trace = name.partition("/")
                    windows.setdefault(window, {}).setdefault(trace or window, {})[row["step"]] = value
        return {w: {t: (list(p), list(p.values())) for t, p in traces.items()} for w, traces in windows.items()}

    def latest(self) -> dict[str, float]:
        """Return {name: last value} of stats.jsonl."""
        values: dict[str, float] = {}
        for row in _thinned(self.rows):
            values.update({k: v for k, v in row.items() if is_number(v)})
        return values

    def checkpoints(self, most: int) -> list[tuple[int, int, str]]:
        """Return [(step, bytes, date and time)] of the newest steps that have a manifest. At most `most` steps are
        listed. The files are not verified."""
        store, found = Checkpoints(self.folder), []
        for step in self.steps[-most:]:
            files = [*store.models.glob(f"*_{step}.th"), store.stats_path(step)]
            size = sum(path.stat().st_size for path in files if path.is_file())
            written = time.localtime(store.manifest_path(step).lstat().st_mtime)
            found.append((step, size, time.strftime("%Y-%m-%d %H:%M", written)))
        return found

    def pictures(self) -> list[Picture]:
        """Return the newest Picture of each series with its strip, followed by the pictures without a step."""
        series, others = run_files.pictures_by_step(self.images), run_files.pictures_without_step(self.images)
        found = []
        for name, files in self._first(series, MOST_PICTURES, f"series of pictures in {self.images}").items():
            step, path = files[-1]
            about = f", step {step}" if self.rows else f" {step}"
            about += f": {CAPTIONS[name]}" if name in CAPTIONS else ""
            found.append(Picture(name, name + about, path))
            if strip := others.pop(f"{name}_progress.png", None):
                found.append(Picture(f"{name}_progress", f"{name} through training", strip))
        found.sort(key=lambda picture: picture.name == "codebook")  # pictures of the codebook are last
        others = self._first(others, MOST_PICTURES, f"more pictures in {self.images}")
        return found + [Picture(name, name, path) for name, path in others.items()]

    def open(self, picture: Picture) -> Image.Image | None:
        """Read a Picture as a Pillow image. If the file is damaged, add a note and return None."""
        try:
            return open_picture(picture.path)
        except DamagedFile as error:
            self.note(str(error))
            return None

    def arguments(self) -> dict[str, Any]:
        """Return the hyperparameters. A folder without hyperparameters gives the arguments of its last experiment,
        without OF_EXPERIMENT. Values from command lines are first."""
        experiments = [row["args"] for row in self.metrics if isinstance(row.get("args"), dict)]
        own = dict(sorted(self.hparams.items(), key=lambda item: item[0] not in self.given))
        last = experiments[-1] if experiments else {}
        return own or {name: value for name, value in last.items() if name not in OF_EXPERIMENT}

    def seconds(self) -> float:
        """Return the seconds of training according to speed.jsonl, without the time between runs."""
        total, before, batch = 0.0, 0.0, self.hparams.get("batch_size")
        if not is_number(batch):
            return 0.0
        for row in self.speed:
            rate, step = row.get("images_per_second"), float(row["step"])
            if is_number(rate) and rate > 0 and step > before:
                total += (step - before) * float(batch) / rate
            before = step
        return total if math.isfinite(total) else 0.0


def reduced(image: Image.Image) -> Image.Image:
    """Convert a Pillow image to RGB, and reduce its sides to at most LARGEST pixels."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image


def _thinned(rows: list[Row]) -> list[Row]:
    """Reduce the rows that have equal names to about MOST_ROWS evenly spaced rows and the last row. The report of a
    long run therefore does not take longer than the report of a short run."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault(tuple(row), []).append(i)
    kept: set[int] = set()
    for places in kinds.values():
        kept.update(places[:: -(-len(places) // MOST_ROWS)], places[-1:])
    return [rows[i] for i in sorted(kept)]


def _dict(value: Any) -> dict[str, Any]:
    """Return a JSON object as a dict, and {} for any other value."""
    return value if isinstance(value, dict) else {}


def _last_lines(path: str) -> list[str]:
    with open(path, "rb") as f:
        f.seek(-min(LAST_BYTES, os.path.getsize(path)), os.SEEK_END)
        lines = f.read(LAST_BYTES).decode("utf-8", "replace").splitlines()
    return [printable(line) for line in lines[-LAST_LINES:]]
