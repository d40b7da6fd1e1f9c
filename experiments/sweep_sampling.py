"""Sweep the settings of sampling over one pair of models: which quality for how many network passes."""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.flags import AGAINST, AgainstConfig, FeaturesConfig, ModelsConfig
from hparams import get_hparams
from hparams.config import ALL_FLAGS, OF_SAMPLING, opt
from utils.core.errors import UsageError, UserError, run_main

# The flags that make a cell, and the flags of the sweep that hold their values.
GRID = dict(
    sample_steps="passes", temp="temps", sample_order="orders", sample_schedule="schedules", remask_eta="remask"
)
LEAST = 10  # samples and training images


def values_of(name, default):
    """Declare a flag of the sweep: values of the flag `name`, with the same bounds."""
    facts = next(flag.meta for flag in ALL_FLAGS if flag.name == name)
    text = f"values of --{name}" + (f": {', '.join(facts['choices'])}" if "choices" in facts else "")
    return opt(default, text, **{k: facts[k] for k in ("min", "max", "choices", "metavar") if k in facts})


@dataclass
class SweepConfig:
    """sweep"""

    n_samples: int = opt(1000, "samples of each cell and seed", min=LEAST)
    seeds: int = opt(3, "seeds of each cell, from --seed on", min=1, max=1000)
    passes: list[int] = values_of("sample_steps", [8, 16, 32, 64])
    temps: list[float] = values_of("temp", [0.8, 1.0])
    orders: list[str] = values_of("sample_order", ["random", "halton", "confidence"])
    schedules: list[str] = values_of("sample_schedule", ["uniform", "arccos"])
    remask: list[float] = values_of("remask_eta", [0.0])
    max_cells: int = opt(60, "the largest number of cells; a larger grid is refused", min=1)
    confirm: int = opt(None, "fresh samples of each seed that confirm the best cell (default: --n_samples)", min=LEAST)
    nearest_k: int = opt(3, "neighbours that make an image's neighbourhood", "advanced", min=1, max=LEAST - 2)


EXAMPLES = """examples:
  python experiments/sweep_sampling.py --sampler absorbing --dataset churches --log_dir sweep_churches \\
      --ae_load_dir vqgan_churches --load_dir absorbing_churches --n_samples 5000
  python experiments/sweep_sampling.py ... --extractor efficientnet_lite0 --passes 16 --temps 0.7 0.8 0.9 1

The same command continues a stopped sweep, and more values add cells: no cell is computed again.
"""


def grid(H):
    """All cells, {flag: value}, in the order of --passes."""
    values = [dict.fromkeys(getattr(H, name)) for name in GRID.values()]
    return [dict(zip(GRID, cell, strict=True)) for cell in itertools.product(*values)]


def settle(H):
    """Refuse what the sweep cannot do."""
    if H.sampler != "absorbing":
        raise UsageError(f"--sampler {H.sampler} has no number of passes to choose: a sweep needs --sampler absorbing")
    for name, values in (*GRID.items(), ("sample_type", "orders")):
        if name in H.explicit:
            raise UsageError(f"--{name} has several values in a sweep: give --{values}")
    if (count := len(grid(H))) > H.max_cells:
        raise UsageError(f"the grid has {count} cells: give fewer values, or --max_cells {count}")


COMMAND_LINE = dict(
    family="sampler",
    description="Find the best settings of sampling for each number of network passes.",
    epilog=EXAMPLES,
    extra=(SweepConfig, FeaturesConfig, AgainstConfig, ModelsConfig),
    passes=OF_SAMPLING,
    settle=settle,
)
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    H = get_hparams(**COMMAND_LINE)

import contextlib
import copy
import json
import statistics
import time
from dataclasses import replace

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.common.images import load_images
from experiments.common.measure import Images, Samples, load_extractor, reference
from experiments.common.models import dry_run_on_images, load_models
from experiments.common.results import Report
from models.pretrained import with_settings
from utils.core import distributed
from utils.core.device import pick_device
from utils.core.files import Lines, atomic_write, hash_json
from utils.core.progress import duration, say
from utils.display.commands import draw_samples
from utils.display.report_plots import STYLE
from utils.display.run_files import read_rows
from utils.evaluation.features import FeatureSet
from utils.evaluation.kernel import KernelDistance
from utils.evaluation.metrics import METRICS

MOST_REAL = 20_000  # training images, evenly spaced, that samples are compared with
MOST_KERNEL = 10_000  # rows of each side in the kernel distance
COLUMNS = dict(
    kernel="kernel distance",
    frechet="Frechet distance",
    precision="precision",
    recall="recall",
    density="density",
    coverage="coverage",
    passes="network passes",
    seconds="seconds",
)


# ---------------------------------------------------------------------- measurements


class Sweep:
    """Measures cells {flag: value}. Real features are computed once. cells.jsonl keeps each measurement."""

    def __init__(self, H, extractor, images, models, folder):
        self.H, self.extractor, self.models, self.path = H, extractor, models, folder / "cells.jsonl"
        side = reference(H, images, models).at_most(MOST_REAL)
        self.about = dict(reference=side.header(), nearest_k=H.nearest_k, **extractor.identity)
        self.real = side.features(extractor)  # None in processes other than the main process
        self.kernel = self.real and KernelDistance(spread(self.real, MOST_KERNEL).features)
        rows = distributed.from_main(lambda: read_rows(str(self.path))[0])
        self.kept = {row["key"]: row["values"] for row in rows if is_measurement(row)}

    def compare(self, fake):
        """The metrics of a FeatureSet, {name: number}; {} in processes other than the main process."""
        pair = None, None
        if fake:  # the number of rows changes recall and coverage, so both sides have equal numbers
            n = min(self.real.count, fake.count)
            pair = spread(self.real, n), spread(fake, n)
        values = METRICS["prdc"].compute(*pair, self.H)
        if not fake:
            return {}
        (frechet,) = METRICS["fid"].compute(self.real, fake, self.H).values()
        return dict(kernel=self.kernel(fake.features[:MOST_KERNEL]), frechet=frechet, **values)

    def measured(self, cell, seed, n):
        """The metrics of n samples of a cell with this seed, the network passes of a sample, the seconds of sampling.
        They are computed only if they are not kept."""
        H = copy.copy(self.H)
        vars(H).update(cell, seed=seed)
        key = hash_json(dict(Samples(H, self.models, n).header(), **self.about))
        if key not in self.kept:
            values = self._draw_and_compare(H, n)
            self.kept[key] = distributed.from_main(lambda: values)
            if distributed.is_main():
                with contextlib.closing(Lines(self.path)) as lines:
                    lines.append(json.dumps(dict(cell=cell, seed=seed, n=n, values=values, key=key)))
                    lines.sync()
        return self.kept[key]

    def _draw_and_compare(self, H, n):
        sampler = self.models.sampler
        model = with_settings(sampler.model, H, self.models.device)
        samples = Samples(H, replace(self.models, sampler=replace(sampler, model=model)), n)
        rows = []  # the number of samples in each pass
        model.net.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
        start = time.monotonic()
        samples.all_ids()
        seconds = time.monotonic() - start
        passes = float(distributed.all_reduce_sum(torch.tensor(sum(rows)))) / n
        return dict(self.compare(samples.compute(self.extractor)), passes=passes, seconds=seconds)

    def mean(self, cell, seeds, n):
        """The means of `measured` over seeds, with standard errors <name>_se if there are two seeds or more."""
        rows = [self.measured(cell, seed, n) for seed in seeds]
        result = {}
        for name in COLUMNS:
            values = [row[name] for row in rows]
            result[name] = statistics.fmean(values)
            if len(values) > 1:
                result[f"{name}_se"] = statistics.stdev(values) / len(values) ** 0.5
        return result


def is_measurement(row):
    """Whether a line of cells.jsonl is complete: another program may have changed the file."""
    key, values = row.get("key"), row.get("values")
    return isinstance(key, str) and isinstance(values, dict) and values.keys() >= COLUMNS.keys()


def spread(found, n):
    """The FeatureSet of at most n rows, evenly spaced, with features only."""
    rows = torch.linspace(0, found.count - 1, min(n, found.count)).round().long()
    return FeatureSet(len(rows), features=found.features[rows])


# ---------------------------------------------------------------------- results: [(cell, means)]


def best(results, **wanted):
    """The result with the least kernel distance among those whose cells have the wanted values; None if none has."""
    found = [item for item in results if wanted.items() <= item[0].items()]
    return min(found, key=lambda item: item[1]["kernel"], default=None)


def best_plain(results, steps):
    """The best result of the original order with this number of steps; None if it is not in the grid."""
    return best(results, sample_steps=steps, sample_order="random", sample_schedule="uniform", remask_eta=0.0)


def described(cell):
    """A cell as text: 16 steps, halton, arccos, temp 0.8."""
    text = f"{cell['sample_steps']} steps, {cell['sample_order']}, {cell['sample_schedule']}, temp {cell['temp']:g}"
    return text + (f", remask {cell['remask_eta']:g}" if cell["remask_eta"] else "")


def number(row, name):
    """A value with its standard error as text; an empty text if there is no such value."""
    se = f" +- {row[f'{name}_se']:.2g}" if f"{name}_se" in row else ""
    return f"{row[name]:.4g}{se}" if name in row else ""


def as_markdown(table):
    """A table of (name, values)."""
    lines = [["setting", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *(number(row, key) for key in COLUMNS)] for name, row in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def pareto(rows):
    """The rows that no other row beats in both passes and kernel distance, in order of their passes."""
    front = []
    for row in sorted(rows, key=lambda row: (row["passes"], row["kernel"])):
        if not front or row["kernel"] < front[-1]["kernel"]:
            front.append(row)
    return front


def plot(results, floor, title):
    """Kernel distance against network passes, with the Pareto front: uint8 (3, h, w). Each order has a colour."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.subplots()
        for order in dict.fromkeys(cell["sample_order"] for cell, _ in results):
            rows = [row for cell, row in results if cell["sample_order"] == order]
            x, y, error = ([row.get(name, 0.0) for row in rows] for name in ("passes", "kernel", "kernel_se"))
            axes.errorbar(x, y, yerr=error, fmt="o", markersize=4, alpha=0.6, label=order)
        front = pareto(row for _, row in results)
        axes.plot(*([row[name] for row in front] for name in ("passes", "kernel")), "k-", lw=1, label="Pareto front")
        if floor:
            axes.axhline(floor["kernel"], color="0.5", linestyle="--", label="reconstructions")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(0.05)
        axes.set(xlabel="network passes of a sample", ylabel="kernel distance", title=title)
        axes.legend()
        canvas.draw()
        pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
        return pixels.view(*canvas.get_width_height()[::-1], 4)[..., :3].permute(2, 0, 1)


# ---------------------------------------------------------------------- the sweep


def main(H):
    device = pick_device(H.device)
    extractor = load_extractor(H, device)  # first, because everything else needs it
    images = load_images(H, "train")
    if len(images) < LEAST:
        raise UserError(f"{H.data_entry['origin']}: a sweep needs {LEAST} training images or more, not {len(images)}")
    models = load_models(H)
    with Report(H, device, autoencoder=models.autoencoder, sampler=models.sampler) as report:
        sweep = Sweep(H, extractor, images, models, report.folder)
        floor = {}  # the metrics of reconstructions: no prior gets better images from this decoder
        if H.against == AGAINST[0]:
            floor = sweep.compare(Images(H, images, models=models).at_most(H.n_samples).features(extractor))
        results, cells, start = [], grid(H), time.monotonic()
        for i, cell in enumerate(cells, 1):
            row = sweep.mean(cell, range(H.seed, H.seed + H.seeds), H.n_samples)
            results.append((cell, row))
            distances = f"kernel {number(row, 'kernel')}, Frechet {number(row, 'frechet')}"
            say(f"[{i}/{len(cells)}] {described(cell)}: {distances} ({duration(time.monotonic() - start)} so far)")
        # The best of many cells is partly lucky: fresh seeds show how good it is.
        winner, _ = best(results)
        plain = best_plain(results, winner["sample_steps"])
        pair = [winner] if plain is None or plain[0] == winner else [winner, plain[0]]
        seeds = range(H.seed + H.seeds, H.seed + 2 * H.seeds)
        fresh = [(cell, sweep.mean(cell, seeds, H.confirm or H.n_samples)) for cell in pair]
        if distributed.is_main():
            show(report, results, floor, fresh, extractor)


def show(report, results, floor, fresh, extractor):
    """Write the table, the plot and the line of metrics.jsonl, and print the commands."""
    H, (winner, row) = report.H, best(results)
    ordered = sorted(results, key=lambda item: item[1]["kernel"])
    table = [(described(cell), row) for cell, row in ordered] + ([("reconstructions", floor)] if floor else [])
    title = f"{H.seeds} x {H.n_samples} samples against {H.against} of '{H.dataset}', features of {H.extractor}"
    again = as_markdown([(described(cell), row) for cell, row in fresh])
    with atomic_write(report.folder / "sweep.md") as f:
        f.write(f"{title}\n\n{as_markdown(table)}\n\nFresh samples\n\n{again}\n".encode())
    path = report.picture("sweep", plot(results, floor, title), "kernel distance against network passes")
    report.values(
        f"best: {described(winner)}; table in {report.folder / 'sweep.md'}, plot in {path}",
        row,
        cell=winner,
        cells=[dict(cell=cell, values=row) for cell, row in results],
        fresh=[dict(cell=cell, values=row) for cell, row in fresh],
        reconstructions=floor,
        features=extractor.identity,
    )
    for cell, row in fresh:
        say(f"fresh samples, {described(cell)}: kernel {number(row, 'kernel')}")
    for steps in sorted({cell["sample_steps"] for cell, _ in results}):
        cell, row = best(results, sample_steps=steps)
        distance = f"kernel {number(row, 'kernel')}{gain(results, cell, row, floor)}"
        say(f"best with {steps} steps: {described(cell)}: {distance}")
        say(f"  {draw_samples(H, f'{H.load_dir}_{steps}_steps', **cell)}")
    say(f"best of all: {described(winner)}\n  {draw_samples(H, f'{H.load_dir}_best', **winner)}")


def gain(results, cell, row, floor):
    """What the best cell gains over the original order with the same number of steps, as text."""
    plain = best_plain(results, cell["sample_steps"])
    if plain is None or plain[0] == cell:
        return ""
    text = f"random, uniform at its best: {number(plain[1], 'kernel')}"
    if (excess := plain[1]["kernel"] - floor.get("kernel", 0.0)) > 0:
        share = (plain[1]["kernel"] - row["kernel"]) / excess
        text += f"; the distance{' above that of the reconstructions' if floor else ''} is {share:.0%} smaller"
    return f" ({text})"


def dry_run(H):
    say(f"{len(grid(H))} cells, {H.seeds} seed(s) of {H.n_samples} samples each")
    dry_run_on_images(H)


if __name__ == "__main__":
    run_main(dry_run if H.dry_run else main, H)
