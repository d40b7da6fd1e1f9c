"""What a run shows: its first and last lines, pictures, bars; on the terminal, in its folder, on the dashboard."""

import math
import os

import torch

from utils.core import distributed
from utils.core.errors import DamagedFile
from utils.core.files import write_json
from utils.display import commands
from utils.display.grids import SAYS_TRIPLES, write_strips
from utils.display.images import TRIPLES, enlarge, save_png, sheet, sheet_grid, triples
from utils.display.run_files import pictures_by_step, read_bars


class Shown:
    """The part of utils.training.run.Run that shows results."""

    def introduce(self, n_items, n_parameters, precision, items="images"):
        """Print the first lines: the model, its data and device, and where the run writes."""
        H, self.n_items = self.H, n_items
        self.say(
            f"{self.name}: {n_parameters / 1e6:.1f}M parameters, {n_items} {items} of '{H.dataset}', "
            f"batch {H.batch_size}, {precision} on {self.device_name}"
        )
        self.say(f"writing to {self.folder}; dashboard: {self.dashboard.url or 'off'}")
        self.facts = dict(
            model=self.name,
            parameters=n_parameters,
            items=n_items,
            of=items,
            precision=precision,
            device=self.device_name,
            torch=torch.__version__,
        )
        if distributed.is_main() and not self.resumed:
            self.write_config()

    def restore_bars(self):
        """Load the bars that bars.json held when the run was stopped."""
        try:
            self.bars = read_bars(os.path.join(self.folder, "bars.json")) if self.step else {}
        except DamagedFile as error:
            self.say(f"warning: {error}; the next bars are written in its place")

    def again(self):
        """The command line that continues the run."""
        again = commands.resume(self.H.script, vars(self.H), **self.H.given("dashboard"))
        return again or "the same command with --resume"

    def show_strips(self):
        """At the end, write one strip for each picture name, with the pictures of all steps."""
        write_strips(os.path.join(self.folder, "images"), self.say)

    def show_bars(self, name, values, xlabel, ylabel, x=None):
        """Show bars of heights `values` (n,) over x on the dashboard. logs/<log_dir>/bars.json keeps the latest of each
        name."""
        if not distributed.is_main():
            return
        self.dashboard.bars(name, values, x, xlabel, ylabel)
        heights = [float(v) if math.isfinite(v) else None for v in values]
        self.bars[name] = dict(step=self.current, values=heights, x=x, xlabel=xlabel, ylabel=ylabel)
        write_json(os.path.join(self.folder, "bars.json"), self.bars)

    def show_images(self, name, images, save, n_columns=None):
        """Show images, uint8 (N, C, H, W), on the dashboard; with save, write them to logs/<log_dir>/images."""
        self._show(name, images, save, name, n_columns=n_columns)

    def show_comparison(self, name, left, right, save):
        """Show originals, reconstructions and their difference, uint8 (N, C, H, W) each, as one picture."""
        self._show(name, triples(left, right), save, f"{name} ({SAYS_TRIPLES})", right, **TRIPLES)

    def show_picture(self, name, picture, caption, save=True, grid=None, min_side=256):
        """Show one picture, uint8 (C, h, w), on the dashboard; with save, write it to logs/<log_dir>/images."""
        if not distributed.is_main():
            return
        shown = enlarge(picture, min_side).expand(3, -1, -1).numpy()
        self.dashboard.image(name, shown, f"{caption}, step {self.current}")
        if save:
            save_png(os.path.join(self.folder, "images", f"{name}_{self.current}.png"), picture, min_side, grid)

    def _show(self, name, images, save, caption, single=None, **layout):
        self.show_picture(name, sheet(images, **layout), caption, save, sheet_grid(images, **layout))
        if not (save and distributed.is_main()):
            return
        folder = os.path.join(self.folder, "images")
        if self.H.save_individually:
            for i, image in enumerate(images if single is None else single):
                save_png(os.path.join(folder, f"{name}_{self.current}_{i}.png"), image)

    def conclude(self, *following):
        """Print the last lines: what was written, and what to run next. following: (what it is, its command line)."""
        steps = self.store.steps()
        if not (distributed.is_main() and steps):
            return
        pictures = os.path.join(self.folder, "images")
        drawn = f"; {', '.join(pictures_by_step(pictures))} in {pictures}" if os.path.isdir(pictures) else ""
        self.say(f"written: checkpoint of step {steps[-1]} in {self.store.models}{drawn}")
        for what, line in (*following, ("this run as a page", commands.show_run(self.H))):
            self.say(f"next, {what}:\n  {line}")
