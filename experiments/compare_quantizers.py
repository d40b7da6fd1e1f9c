"""Compare the quantizers on your own images. Each quantizer gets short trainings of both stages and a row in a table.

The script calls the scripts that a user calls. Finished work is skipped, and interrupted work is resumed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hparams import get_hparams
from hparams.config import QUANTIZERS, flags_of, names_of, opt, vqgan_family
from utils.core.errors import UsageError
from utils.core.job import world_size


@dataclass
class ComparisonConfig:
    """comparison"""

    quantizers: list[str] = opt(
        None, f"any of {', '.join(QUANTIZERS)} (default: all)", choices=list(QUANTIZERS), metavar="NAME"
    )
    seeds: int = opt(3, "seeds per quantizer, from --seed on", min=1, max=1000)
    prior_steps: int = opt(1000, "training steps of the prior over the codes", min=1)


STEPS = 1000  # the default of --train_steps in a comparison
READS = ("preset", "train_steps", "lr", "perceptual_weight", "perceptual_net", "random_crop", "horizontal_flip")
# A comparison sets these flags itself, or does not use them. All other flags go to the training of stage 1.
SET_HERE = {
    *("train_steps", "seed", "quantizer", "log_dir", "resume", "dry_run", "keep_checkpoints"),
    *("load_dir", "load_step", "load_optim", "steps_per_eval", "steps_per_checkpoint", "steps_per_save_output"),
    *names_of("dashboard"),
}
PASSED = {flag.name for flag in flags_of(vqgan_family())} - SET_HERE
EXAMPLES = f"""examples:
  python experiments/compare_quantizers.py --dataset demo --log_dir compared
  python experiments/compare_quantizers.py --dataset custom --custom_dataset_path ~/photos --preset small \\
      --log_dir compared --quantizers nearest ema --seeds 5 --train_steps 2500 --prior_steps 2500

Stage 1 takes the flags of train_vqgan.py with their defaults, except that the default of --train_steps is {STEPS}.
The same command continues a stopped comparison.
"""


def settle(H):
    """Set the defaults of a comparison. Raise UsageError for flags that a comparison does not support."""
    if world_size() > 1:
        raise UsageError("start it as one process: it starts the trainings itself")
    if H.load_step:
        raise UsageError("--load_step has no place here: every training starts afresh")
    if "quantizer" in H.explicit:
        raise UsageError(f"--quantizer {H.quantizer}: the quantizers to compare are given as --quantizers")
    H.quantizers = list(dict.fromkeys(H.quantizers or QUANTIZERS))
    if "train_steps" not in H.explicit:
        H.train_steps = STEPS


COMMAND_LINE = dict(
    family="vqgan",
    description="Compare the quantizers on a data set.",
    epilog=EXAMPLES,
    extra=(ComparisonConfig,),
    reads=READS,
    passes=PASSED,
    settle=settle,
)
if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    H = get_hparams(**COMMAND_LINE)

import contextlib
import json
import math
import os
import shlex
import statistics

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.common.calls import curve, environment, finished, run_script
from experiments.common.images import load_images
from experiments.common.results import Report
from hparams import sources
from hparams.checks import shown
from utils.core.errors import UserError, run_main
from utils.core.files import read_json, write_json
from utils.core.job import LOGS
from utils.core.progress import say
from utils.display.commands import command, new_name
from utils.display.report_plots import STYLE

EVALUATIONS = 8  # evaluations of the prior in one training; the lowest bits are reported
MEASURED = 2000  # the largest number of validation images that are measured
# The prior is small and the same for all quantizers. The preset gives all other values.
PRIOR = dict(sampler="absorbing", bert_n_emb=128, bert_n_head=4, bert_n_layers=6, ema=True)
PRIOR_TRAINING = dict(batch_size=32, lr=1e-3, warmup_iters=100)
# Each column of the table has a title and a format for its numbers.
COLUMNS = dict(
    codes_used=("codes in use", ".0f"),
    perplexity=("perplexity", ".1f"),
    l1=("L1", ".4f"),
    psnr=("PSNR", ".2f"),
    perceptual=("perceptual", ".4f"),
    bits_per_code=("bits/code", ".3f"),
    bits_per_picture=("bits/picture", ".1f"),
)


# ---------------------------------------------------------------------- the trainings


def given(H, names):
    """Return {flag: value} of the flags `names` that the command line gave, for display.commands.command."""
    return dict(as_typed(name, getattr(H, name)) for name in H.explicit if name in names)


def as_typed(name, value):
    if isinstance(value, bool):
        return (name if value else f"no_{name}"), True
    return name, ",".join(map(str, value)) if isinstance(value, list) else shown(value)


def events(steps):
    """Return the flags that set when a training with this number of steps validates and writes."""
    often = max(1, steps // EVALUATIONS)
    return dict(steps_per_eval=often, steps_per_checkpoint=often, keep_checkpoints=2, steps_per_save_output=steps)


def commands_of(H, quantizer, seed):
    """Yield the parts of a cell's work: (name, folder under logs/, last step or None, command line)."""
    images = given(H, {*names_of("data", "machine"), "custom_dataset_path"})
    cell = f"{H.log_dir}/{quantizer}_{seed}"
    vqgan, prior = (dict(log_dir=f"{cell}/{name}", seed=seed, no_visdom=True) for name in ("vqgan", "prior"))
    vqgan |= dict(quantizer=quantizer, train_steps=H.train_steps, resume=True, **events(H.train_steps))
    prior |= dict(train_steps=H.prior_steps, resume=True, **events(H.prior_steps), **PRIOR, **PRIOR_TRAINING)
    mirror = given(H, ["horizontal_flip"])
    loaded = dict(ae_load_dir=f"{cell}/vqgan", ae_load_step=H.train_steps)
    measures = dict(log_dir=f"{cell}/measures", split="val", extractor="efficientnet_lite0", n_samples=MEASURED)
    yield "stage 1", f"{cell}/vqgan", H.train_steps, command("train_vqgan.py", **vqgan | given(H, PASSED))
    yield (
        "reconstructions",
        f"{cell}/measures",
        None,
        command("experiments/calc_VQGAN_FID.py", **images, **loaded, **measures, no_visdom=True, steps_per_eval=1),
    )
    yield "prior", f"{cell}/prior", H.prior_steps, command("train_sampler.py", **prior | images | loaded | mirror)


def is_done(folder, step):
    """Say whether a part of a cell is complete. step: the last step of a training; None: the part measures."""
    return finished(LOGS / folder, step) if step else bool(measured(LOGS / folder))


def measured(folder):
    """Return the values of the last line of a folder's metrics.jsonl, or {} if there is no such line."""
    path = folder / "metrics.jsonl"
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a full disk or a crash can leave a damaged line
            values = json.loads(line)["values"]
    return values


def train_all(H):
    """Do the open work, one seed after the other. A stopped comparison then has results of all quantizers."""
    cells = [(seed, quantizer) for seed in seeds_of(H) for quantizer in H.quantizers]
    for number, (seed, quantizer) in enumerate(cells, 1):
        for what, folder, step, line in commands_of(H, quantizer, seed):
            if is_done(folder, step):
                continue
            say(f"\n[{number}/{len(cells)}] {quantizer}, seed {seed}: {what}\n$ {line}")
            if run_script(shlex.split(line)[1:], environment()):
                raise UserError(
                    f"{what} of {quantizer}, seed {seed}, failed (see above); finished work is kept: the same command "
                    "continues"
                )


def seeds_of(H):
    return range(H.seed, H.seed + H.seeds)


def check_settings(H):
    """Raise UserError if the folder holds a comparison with other flags. One table must not mix such results."""
    path = LOGS / H.log_dir / "settings.json"
    now = dict(given(H, PASSED), train_steps=H.train_steps, prior_steps=H.prior_steps)
    now = {name: value for name, value in now.items() if name not in names_of("machine")}
    if H.custom_dataset_path:
        now["custom_dataset_path"] = os.path.abspath(os.path.expanduser(H.custom_dataset_path))
    before = read_json(path) if path.is_file() else now
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            values = [f"--{name} {some[name]}" if name in some else f"no --{name}" for some in (now, before)]
            raise UserError(
                f"{values[0]} contradicts logs/{H.log_dir}, which holds a comparison with {values[1]}: give another "
                "--log_dir"
            )
    write_json(path, now)


# ---------------------------------------------------------------------- the results


def values_of(H, quantizer, seed):
    """Return {column: value} of a finished cell."""
    folder = LOGS / H.log_dir / f"{quantizer}_{seed}"
    found = measured(folder / "measures")
    # The last epoch of training gives the use of codes over all images. A training of less than an epoch has only the
    # values of validation.
    usage = {name: [found[name], *curve(folder / "vqgan", name)][-1] for name in ("codes_used", "perplexity")}
    codes = math.prod(read_json(folder / "vqgan" / "config.json")["hparams"]["latent_shape"])
    bits = min(curve(folder / "prior", "val_bits"))
    perceptual = found["perceptual_efficientnet_lite0"]
    return dict(
        **usage, l1=found["l1"], psnr=found["psnr"], perceptual=perceptual, bits_per_code=bits,
        bits_per_picture=bits * codes,
    )  # fmt: skip


def summarised(cells):
    """Summarise [{column: value}] of all seeds as {column: mean, column_se: standard error (with two seeds or
    more)}."""
    row = {}
    for name in COLUMNS:
        values = [cell[name] for cell in cells]
        row[name] = statistics.fmean(values)
        if len(values) > 1:
            row[f"{name}_se"] = statistics.stdev(values) / math.sqrt(len(values))
    return row


def best_of(table):
    """Return the quantizer to recommend. Candidates have an L1 within two standard errors of the lowest L1. The
    candidate with the fewest bits per picture is returned. table: {quantizer: result of `summarised`}."""
    lowest = min(table.values(), key=lambda row: row["l1"])

    def is_close(row):
        error = math.hypot(row.get("l1_se", 0.0), lowest.get("l1_se", 0.0))
        return row["l1"] - lowest["l1"] <= 2 * error

    close = [name for name, row in table.items() if is_close(row)]
    return min(close, key=lambda name: table[name]["bits_per_picture"])


def lines_of(table):
    """Return the lines of the table as {first cell: text of all further cells}. A column has one width."""
    rows = {"quantizer": [title for title, _ in COLUMNS.values()]}
    for name, row in table.items():
        rows[name] = [
            f"{row[key]:{form}}" + (f" +- {row[f'{key}_se']:{form}}" if f"{key}_se" in row else "")
            for key, (_, form) in COLUMNS.items()
        ]
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    return {
        name: "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()
        for name, cells in rows.items()
    }


def plot(table, cells):
    """Plot distortion against bits per picture, uint8 (3, h, w), with means, standard errors and all trainings."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.subplots()
        for number, (name, row) in enumerate(table.items()):
            own = [cell for cell in cells if cell["quantizer"] == name]
            axes.plot([c["bits_per_picture"] for c in own], [c["l1"] for c in own], ".", color=f"C{number}", alpha=0.4)
            errors = dict(xerr=row.get("bits_per_picture_se"), yerr=row.get("l1_se"))
            axes.errorbar(row["bits_per_picture"], row["l1"], **errors, fmt="o", color=f"C{number}", label=name)
        axes.set(xlabel="bits per picture (prior, validation)", ylabel="L1 (reconstructions, validation)")
        axes.margins(0.1)
        axes.legend()
        canvas.draw()
        return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(
            *canvas.get_width_height()[::-1], 4
        )[..., :3].permute(2, 0, 1)  # fmt: skip


def recommended(H, quantizer):
    """Return a command that trains with a quantizer. The steps are those of the preset or else of this comparison."""
    of_preset = sources.preset_values(H.preset or sources.preset_of(H.data_entry), "vqgan")
    steps = {} if "train_steps" in of_preset else dict(train_steps=H.train_steps)
    return command(
        "train_vqgan.py", **given(H, PASSED), quantizer=quantizer, log_dir=new_name(f"vqgan_{quantizer}"), **steps
    )


def main(H):
    if len(load_images(H, "val", hold_out=True)) < 2:
        raise UserError(f"{H.data_entry['origin']}: two validation images or more are needed, of 30 images or more")
    check_settings(H)
    train_all(H)
    cells = [
        dict(quantizer=quantizer, seed=seed, **values_of(H, quantizer, seed))
        for quantizer in H.quantizers
        for seed in seeds_of(H)
    ]
    table = {name: summarised([cell for cell in cells if cell["quantizer"] == name]) for name in H.quantizers}
    best = best_of(table)
    with Report(H, torch.device("cpu")) as report:
        write_json(report.folder / "table.json", dict(table=table, cells=cells, recommended=best))
        report.picture("distortion_and_bits", plot(table, cells), "distortion against bits per picture")
        report.values(
            f"\n{len(table)} quantizers on '{H.dataset}', {H.seeds} seed(s), {H.train_steps} and {H.prior_steps} "
            "steps; means +- standard errors",
            lines_of(table),
            table=table,
        )
        say(f"recommended, the fewest bits among the lowest L1:\n  {recommended(H, best)}")


def dry_run(H):
    count = len(H.quantizers) * H.seeds
    say(f"{count} trainings of both stages: {', '.join(H.quantizers)}, {H.seeds} seed(s); the first of them:")
    for what, _, _, line in commands_of(H, H.quantizers[0], H.seed):
        say(f"{what}:\n  {line}")


if __name__ == "__main__":
    run_main(dry_run if H.dry_run else main, H)
