"""Reports the results of an experiment on the terminal, in metrics.jsonl, as pictures and on the dashboard. Only the
main process reports. In all other processes these functions do nothing."""

import contextlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from experiments.common.flags import AGAINST
from experiments.common.weights import Loaded
from hparams.checks import shown
from hparams.config import names_of
from hparams.resolve import Hparams
from utils.core import distributed
from utils.core.cache import versions
from utils.core.checkpoint import LOGS
from utils.core.device import device_name
from utils.core.files import Lines, check_appendable
from utils.core.json_files import parse_json
from utils.core.progress import say
from utils.display.html import as_text
from utils.display.images import enlarge, save_png
from utils.display.live_dashboard import Dashboard
from utils.display.report import report_at_end
from utils.evaluation.metrics import EXTRACTORS


def command_of(H: Hparams) -> str:
    """Write the command line as text, without --log_dir and without flags that do not change the pictures."""
    idle = {"log_dir", *names_of("dashboard", "machine", "request")}
    words = [f"--{name} {shown(getattr(H, name))}" for name in H.explicit if name not in idle]
    return " ".join([H.script, *words])


class Pictures:
    """The pictures of one command in logs/<log_dir>/images. pictures.jsonl records the command of each picture.

    folder: logs/<log_dir>; command: see command_of. count: the number of pictures of this command so far.
    """

    def __init__(self, folder: Path, command: str):
        self.folder, self.command, self.count, self.number = folder, command, 0, 1
        self.lines: Lines | None = None
        self.drawn_by: dict[str, str] = {}

    def place(self, name: str) -> Path:
        """Return the path images/<name>. If another command has written this picture, the path gets a number before the
        suffix. Later names get the same number."""
        self.lines = self.lines or self._open()
        images = self.folder / "images"
        stem, suffix = name.rsplit(".", 1)
        for number in itertools.count(self.number):
            chosen = name if number == 1 else f"{stem}.{number}.{suffix}"
            if not (images / chosen).exists() or self.drawn_by.get(chosen) == self.command:
                break
        if number > self.number:
            say(f"{images / name} was drawn by another command and stays; this one draws {images / chosen}")
        self.number = number
        if self.drawn_by.get(chosen) != self.command:
            self.drawn_by[chosen] = self.command
            self.lines.append(json.dumps(dict(picture=chosen, command=self.command)))
        self.count += 1
        return images / chosen

    def _open(self) -> Lines:
        path = self.folder / "pictures.jsonl"
        lines = Lines(path)
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # ignore a line that is damaged
                row = parse_json(line)
                self.drawn_by[str(row["picture"])] = str(row["command"])
        return lines


class Report:
    """Reports the results of one command. Use a Report as a context manager, unless the caller owns the dashboard.

    models: the measured models by name, each a models.pretrained.Loaded.
    """

    def __init__(self, H: Hparams, device: torch.device, dashboard: Dashboard | None = None, **models: Loaded | None):
        self.H, self.device = H, device
        self.folder, self.pictures = Path(LOGS, H.log_dir), Pictures(Path(LOGS, H.log_dir), command_of(H))
        self.checkpoints = {name: dict(path=m.path, hash=m.hash) for name, m in models.items() if m is not None}
        self.is_main = distributed.is_main()
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_appendable(self.folder / "metrics.jsonl")  # an error must come before the work, not after it
        self.dashboard = dashboard or Dashboard(
            H.visdom_server,
            H.visdom_port,
            H.log_dir,
            enabled=self.is_main and not H.no_visdom,
            say=say,
            plan=("results", "properties"),
        )
        self.dashboard.properties(H.known())

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.dashboard.close()
        if kind is None:
            if self.is_main:
                self.conclude()
            distributed.cleanup()
            if self.is_main:  # the report is written last, so that Ctrl-C loses only the report
                report_at_end(self.folder, say)

    def conclude(self) -> None:
        """Print the paths of the written files."""
        images = f" and {self.folder / 'images'}" if self.pictures.count else ""
        say(f"written: {self.folder / 'metrics.jsonl'}{images}")

    def values(self, title: str, values: dict, **about: Any) -> None:
        """Print {name: number or text} as a table, and append it to logs/<log_dir>/metrics.jsonl with every
        argument, the checkpoints' hashes and `about` (JSON values). A key name_se is the standard error of name."""
        if not self.is_main:
            return
        shown = {name: as_text(value) for name, value in values.items() if not name.endswith("_se")}
        for name in shown:
            if f"{name}_se" in values:
                shown[name] += f" +- {as_text(values[f'{name}_se'])}"
        width = max(map(len, shown))
        say("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in shown.items())]))
        row = dict(
            metric=self.H.script,
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            values={k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()},
            **about,
            checkpoints=self.checkpoints,
            args=self.H.known(),
            device=device_name(self.device),
            torch=torch.__version__,
            versions=versions("Pillow", "torch-fidelity"),
        )
        self.append(row)
        self.dashboard.properties({"": title, **shown}, "results")

    def compared(self, values: dict, more: str = "", **about: Any) -> None:
        """Report the result of measure.compare in the same way as `values`. more: text for the end of the title."""
        if self.is_main:
            rebuilt = "reconstructions of " if self.H.against == AGAINST[1] else ""
            sides = f"{values['samples']} samples against {values['training_images']} {rebuilt}training images"
            network = "" if self.H.extractor == EXTRACTORS[0] else f", features of {self.H.extractor}"
            self.values(f"{sides} of '{self.H.dataset}'{more}{network}", values, **about)

    def append(self, row: dict) -> None:
        """Append one line to metrics.jsonl in a single write, because several commands may write to the same file."""
        with contextlib.closing(Lines(self.folder / "metrics.jsonl")) as lines:
            lines.append(json.dumps(row))
            lines.sync()

    def picture(
        self,
        name: str,
        picture: torch.Tensor,
        caption: str | None = None,
        min_side: int = 256,
        shown: str | None = None,
    ) -> Path:
        """Save a picture, uint8 (C, h, w), as images/<name>.png, and show it on the dashboard. A small picture is
        enlarged. shown: the pane of the dashboard (default: a pane of its own). Returns the path, which may have a
        number (see Pictures.place)."""
        if not self.is_main:
            return self.folder / "images" / f"{name}.png"
        path = self.pictures.place(f"{name}.png")
        save_png(path, picture, min_side)
        self.dashboard.image(shown or name, enlarge(picture, 256).expand(3, -1, -1).numpy(), caption or name)
        return path
