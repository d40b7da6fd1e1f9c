"""Shows curves, bars and pictures of a training run on the dashboard, and writes pictures to its folder."""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from utils.core import distributed
from utils.core.checkpoint import LOGS
from utils.core.device import device_name
from utils.core.errors import DamagedFile
from utils.core.files import write_json
from utils.core.progress import Progress, duration
from utils.display.dashboard_panes import notes_of, plan_of, time_left
from utils.display.grids import TRIPLES_CAPTION, write_strips
from utils.display.images import TRIPLES, enlarge, save_png, sheet, sheet_grid, triples
from utils.display.live_dashboard import Dashboard
from utils.display.run_files import curve_rows, curves_of, pictures_by_step, read_bars


class RunDisplay:
    """Shows the dashboard and the pictures of a run. Only the main process shows anything. The attribute `step` is the
    step of the pictures and bars."""

    def __init__(
        self, H: Any, name: str, device: torch.device, folder: str, step: int, say: Callable[[str], None]
    ) -> None:
        """name: the name of the model. step: the last completed step."""
        self.H, self.folder, self.step, self.say = H, folder, step, say
        self.pictures = os.path.join(folder, "images")
        self.device_name = device_name(device)
        self._bars = self._earlier_bars() if step and distributed.is_main() else {}
        self.dashboard = Dashboard(
            H.visdom_server,
            H.visdom_port,
            H.log_dir,
            enabled=not H.no_visdom and distributed.is_main(),
            say=say,
            plan=plan_of(H, name, device.type),
            notes=notes_of(H, name),
            images_per_step=H.batch_size,
        )
        self.dashboard.properties(H.known())
        self.progress(step, "starting")
        for other in (H.visdom_compare or ()) if self.dashboard.enabled else ():
            self.dashboard.compare(other, curve_rows(os.path.join(LOGS, other, "stats.jsonl")))

    def _earlier_bars(self) -> dict[str, Any]:
        """Return the bars that an earlier start of the run has written to bars.json."""
        try:
            return read_bars(os.path.join(self.folder, "bars.json"))
        except DamagedFile as error:
            self.say(f"warning: {error}; the next bars are written in its place")
            return {}

    def history(self) -> None:
        """Show the curves of the steps before a resumed run."""
        if distributed.is_main():
            self.dashboard.history(curve_rows(os.path.join(self.folder, "stats.jsonl")))

    def curves(self, values: dict[str, Any]) -> None:
        """Show a row of stats.jsonl."""
        self.dashboard.scalars(self.step, curves_of(values))

    def progress(
        self, step: int, state: str, images_per_second: float | None = None, progress: Progress | None = None
    ) -> None:
        """Show the progress of the run on the dashboard. progress: the Progress object of this process, from which the
        remaining time is estimated."""
        total = self.H.train_steps
        shown = {"images seen": f"{step * self.H.batch_size:,}"}
        if progress is not None and progress.rate():
            shown["time so far"] = duration(time.monotonic() - progress.start)
            if state == "running":
                shown["time left"] = time_left((total - step) / progress.rate())
        if images_per_second:
            shown["images / s"] = f"{images_per_second:.3g}"
        self.dashboard.progress(step, total, dict(shown, device=self.device_name), state)

    def bars(
        self, name: str, values: Sequence[float], xlabel: str, ylabel: str, x: Sequence[Any] | None = None
    ) -> None:
        """Show bars of heights `values` (n,) over x on the dashboard. logs/<log_dir>/bars.json keeps the latest bars of
        each name."""
        if not distributed.is_main():
            return
        self.dashboard.bars(name, values, x, xlabel, ylabel)
        heights = [float(v) if math.isfinite(v) else None for v in values]
        self._bars[name] = dict(step=self.step, values=heights, x=x, xlabel=xlabel, ylabel=ylabel)
        write_json(os.path.join(self.folder, "bars.json"), self._bars)

    def images(self, name: str, images: torch.Tensor, save: bool) -> None:
        """Show images, uint8 (N, C, H, W), on the dashboard. If `save` is True, also write the images to
        logs/<log_dir>/images."""
        self.picture(name, sheet(images), name, save, sheet_grid(images))
        if save:
            self._save_individually(name, images)

    def comparison(self, name: str, left: torch.Tensor, right: torch.Tensor, save: bool) -> None:
        """Show originals (left), reconstructions (right) and their differences as one picture. Both arguments are uint8
        (N, C, H, W)."""
        images, caption = triples(left, right), f"{name} ({TRIPLES_CAPTION})"
        self.picture(name, sheet(images, **TRIPLES), caption, save, sheet_grid(images, **TRIPLES))
        if save:
            self._save_individually(name, right)

    def picture(
        self, name: str, picture: torch.Tensor, caption: str, save: bool = True, grid: Any = None, min_side: int = 256
    ) -> None:
        """Show one picture, uint8 (C, h, w), on the dashboard. If `save` is True, also write the picture to
        logs/<log_dir>/images."""
        if not distributed.is_main():
            return
        shown = enlarge(picture, min_side).expand(3, -1, -1).numpy()
        self.dashboard.image(name, shown, f"{caption}, step {self.step}")
        if save:
            save_png(os.path.join(self.pictures, f"{name}_{self.step}.png"), picture, min_side, grid)

    def _save_individually(self, name: str, images: torch.Tensor) -> None:
        if self.H.save_individually and distributed.is_main():
            for i, image in enumerate(images):
                save_png(os.path.join(self.pictures, f"{name}_{self.step}_{i}.png"), image)

    def strips(self) -> None:
        """Write one strip for each picture name, with pictures of several steps. A run calls this method at its end."""
        write_strips(self.pictures, self.say)

    def saved(self) -> str:
        """Return the names of the pictures in the run's folder, as the end of a sentence."""
        if not os.path.isdir(self.pictures):
            return ""
        return f"; {', '.join(pictures_by_step(self.pictures))} in {self.pictures}"
