"""Reads a run's folder without trusting it: damaged files are noted and skipped."""

import io
import itertools
import math
import os
import re
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image

from utils.core.checkpoint import Checkpoints
from utils.core.errors import DamagedFile, printable
from utils.core.files import read_json
from utils.display.grids import MOST_PIXELS, SAYS_TRIPLES, write_strips
from utils.display.run_files import (
    curves_of,
    is_number,
    is_regular,
    pictures_by_step,
    read_bars,
    read_curves,
    read_rows,
)

LARGEST = 1600  # pixels of the longer side of a picture on the page
HEAVIEST = 3 << 20  # bytes of a picture that is shown as it is
MOST_PICTURES = 24  # with a step, and as many without, as experiments draw them
MOST_CURVES = 100  # drawing one takes 50 ms, and 17 KB of the page
MOST_BARS = 24
SAYS = dict(
    reconstructions=SAYS_TRIPLES,
    codebook="the mean of the pixels where a code is used, most used first",
    denoising="samples while they are drawn, by the completed share of sampling",
)
LAST_LINES = 60  # of log.txt
LAST_BYTES = 1 << 16  # of log.txt


@dataclass
class Picture:
    """A picture file: its name without the step, what to say of it, its path."""

    name: str
    caption: str
    path: str
    note: object  # called with what is wrong

    def opened(self):
        """As a Pillow image of its first frame, or None."""
        try:
            image = Image.open(self.path, formats=("PNG", "GIF", "JPEG"))
            if image.size[0] * image.size[1] > MOST_PIXELS:
                raise ValueError("too many pixels")
            image.load()
            return image
        except Exception as error:  # on damaged files Pillow's readers can raise anything
            self.note(f"{self.path} cannot be shown: {' '.join(str(error).split())[:120]}")
            return None

    def array(self):
        """uint8 (3, H, W), or None."""
        image = self.opened()
        return None if image is None else np.asarray(reduced(image.convert("RGB"))).transpose(2, 0, 1)

    def embedded(self):
        """(format, bytes, width in pixels) for the page, or None; large ones reduced."""
        image = self.opened()
        if image is None:
            return None
        fits = max(image.size) <= LARGEST or image.format == "GIF"
        if fits and os.path.getsize(self.path) <= HEAVIEST:
            with open(self.path, "rb") as f:
                return image.format.lower(), f.read(), image.size[0]
        image, buffer = reduced(image.convert("RGB")), io.BytesIO()
        image.save(buffer, format="JPEG", quality=88)
        return "jpeg", buffer.getvalue(), image.size[0]


def reduced(image):
    """Within LARGEST pixels."""
    if max(image.size) <= LARGEST:
        return image
    return image.resize([max(1, round(n * LARGEST / max(image.size))) for n in image.size], Image.LANCZOS)


class SavedRun:
    """A run's folder as a run. `notes`: what was missing or damaged, one sentence each."""

    def __init__(self, folder):
        self.folder, self.notes = str(folder), []
        self.name = os.path.relpath(self.folder, "logs")
        config = self._json("config.json", read_json) or {}
        self.script = str(config.get("script", "")) if isinstance(config, dict) else ""
        self.hparams = self._dict(config, "hparams")
        self.facts = self._dict(config, "facts")
        self.rows = self._rows("stats.jsonl", read_curves)
        self.speed = self._rows("speed.jsonl", read_curves)
        self.metrics = [row for row in self._rows("metrics.jsonl", read_rows) if isinstance(row.get("values"), dict)]
        self.bars = self._first(self._json("bars.json", read_bars) or {}, MOST_BARS, "bar plots")
        self.curves = self._curves()
        self.log = self._lines("log.txt")
        self.steps = Checkpoints(self.folder).steps()
        self.images = os.path.join(self.folder, "images")
        self.strips = self._strips()

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(printable(text))

    def _file(self, name):
        """The path of a regular file of this folder, or None. A link could lead to a file that its user would not
        show to others."""
        path = os.path.join(self.folder, name)
        if os.path.islink(path):
            self._note(f"{name} is a symbolic link; it is passed over")
            return None
        return path if os.path.isfile(path) else None

    def _json(self, name, read):
        path = self._file(name)
        try:
            return read(path) if path else None
        except (DamagedFile, OSError) as error:
            self._note(f"{error}; it is passed over")
            return None

    @staticmethod
    def _dict(config, name):
        value = config.get(name) if isinstance(config, dict) else None
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}

    def _rows(self, name, read):
        try:
            path = self._file(name)
            rows, damaged = read(path) if path else ([], 0)
        except OSError as error:
            self._note(f"{name} cannot be read ({error.strerror}); it is passed over")
            return []
        if damaged:
            self._note(f"{damaged} damaged line{'s' if damaged > 1 else ''} of {name} passed over")
        return rows

    def _first(self, named, most, what):
        """The first entries of a dict; a note says how many there are if they are more."""
        if len(named) > most:
            self._note(f"the first {most} of {len(named):,} {what} are shown")
        return dict(itertools.islice(named.items(), most))

    def _curves(self):
        """[(step, {curve: value})], of the losses and of the speed, as the dashboard takes them."""
        speed = [
            (row["step"], {printable(k): v for k, v in row.items() if k != "step" and is_number(v)})
            for row in self.speed
        ]
        rows = sorted([(row["step"], curves_of(row)) for row in self.rows] + speed, key=lambda item: item[0])
        names = self._first(dict.fromkeys(name for _, curves in rows for name in curves), MOST_CURVES, "curves")
        return [(step, {k: v for k, v in curves.items() if k in names}) for step, curves in rows]

    def _lines(self, name):
        path = self._file(name)
        if not path:
            return []
        with open(path, "rb") as f:
            f.seek(-min(LAST_BYTES, os.path.getsize(path)), os.SEEK_END)
            lines = f.read(LAST_BYTES).decode("utf-8", "replace").splitlines()
        return [printable(line) for line in lines[-LAST_LINES:]]

    def _strips(self):
        """The progress strips, drawn again if the folder is writable."""
        try:
            return write_strips(self.images, self._note)
        except OSError as error:
            self._note(f"the strips of progress could not be written: {error.strerror}")
            return []

    # ------------------------------------------------------------------ what there is

    def is_empty(self):
        return not (self.rows or self.metrics or self.bars or self.steps or self.pictures())

    def step(self):
        """The last known step."""
        return max([0, *(row["step"] for row in self.rows[-1:]), *self.steps[-1:]])

    def traces(self):
        """{window: {trace: (steps, values)}}; if a step was recorded twice, the later line counts."""
        windows = {}
        for step, curves in self.curves:
            for name, value in curves.items():
                window, _, trace = name.partition("/")
                windows.setdefault(window, {}).setdefault(trace or window, {})[step] = value
        return {w: {t: (list(p), list(p.values())) for t, p in traces.items()} for w, traces in windows.items()}

    def latest(self):
        """{name: its last value} of stats.jsonl."""
        values = {}
        for row in self.rows:
            values.update({k: v for k, v in row.items() if is_number(v)})
        return values

    def checkpoints(self, most):
        """[(step, bytes, time)] of the newest steps that have a manifest, `most` of them; their files are not
        verified."""
        store, found = Checkpoints(self.folder), []
        for step in self.steps[-most:]:
            files = [*store.models.glob(f"*_{step}.th"), store.stats_path(step)]
            size = sum(path.stat().st_size for path in files if path.is_file())
            found.append((step, size, store.manifest_path(step).lstat().st_mtime))
        return found

    def pictures(self):
        """The newest picture of each name, the strips, and then those that have no step."""
        series = pictures_by_step(self.images) if os.path.isdir(self.images) else {}
        found = []
        for name, files in self._first(series, MOST_PICTURES, f"series of pictures in {self.images}").items():
            step, path = files[-1]
            more = f": {SAYS[name]}" if name in SAYS else ""
            caption = f"{name}, step {step}{more}" if self.rows else f"{name} {step}{more}"
            found.append(Picture(name, caption, path, self._note))
        for path in self.strips:
            name = re.sub(r"\.png$", "", os.path.basename(path))
            found.append(Picture(name, f"{name.removesuffix('_progress')} through training", path, self._note))
        found.sort(key=lambda picture: picture.name == "codebook")  # the others first
        known = {p.path for p in found} | {path for files in series.values() for _, path in files}
        others = sorted(os.listdir(self.images)) if os.path.isdir(self.images) else []
        others = [os.path.join(self.images, n) for n in others if n.endswith((".png", ".gif"))]
        others = [path for path in others if path not in known and is_regular(path) and not _is_part(path)]
        others = {os.path.basename(path): path for path in others}
        for name, path in self._first(others, MOST_PICTURES, f"more pictures in {self.images}").items():
            found.append(Picture(name, name, path, self._note))
        return found

    def newest_arguments(self):
        """The arguments of the last experiment that was recorded here."""
        for row in reversed(self.metrics):
            if isinstance(row.get("args"), dict):
                return {str(k): v for k, v in row["args"].items()}
        return {}

    def seconds(self):
        """Seconds of training according to speed.jsonl, without the time between runs."""
        total, before, batch = 0.0, 0.0, self.hparams.get("batch_size")
        for row in self.speed if is_number(batch) else ():
            rate, step = row.get("images_per_second"), float(row["step"])
            if is_number(rate) and rate > 0 and step > before:
                total += (step - before) * float(batch) / rate
            before = step
        return total if math.isfinite(total) else 0.0


def _is_part(path):
    """Of --save_individually: <name>_<step>_<i>.png."""
    return re.fullmatch(r".+_\d+_\d+\.png", os.path.basename(path)) is not None


def when(seconds):
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
