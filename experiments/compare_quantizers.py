"""Compare the quantizers on your own images: short trainings of both stages with each, and a table of what they cost.

Calls the scripts that a user calls. It skips finished work and resumes interrupted work.
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
        None, f"of {', '.join(QUANTIZERS)} (default: all)", choices=list(QUANTIZERS), metavar="NAME"
    )
    seeds: int = opt(3, "trainings with each, from --seed on", min=1, max=1000)
    prior_steps: int = opt(1000, "training steps of the prior over the codes", min=1)


STEPS = 1000  # the default of --train_steps in a comparison
READS = ("preset", "train_steps", "lr", "perceptual_weight", "perceptual_net", "random_crop", "horizontal_flip")
# What a comparison sets itself, or what means nothing here; everything else goes to the training of stage 1.
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

Stage 1 takes the flags of train_vqgan.py and has its defaults; only --train_steps is {STEPS} unless given.
The same command continues what was stopped.
"""


def settle(H):
    """The defaults of a comparison, and what it cannot do."""
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
if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
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
MEASURED = 2000  # validation images, at most
# Small and the same for all quantizers; what it leaves open is that of the preset.
PRIOR = dict(sampler="absorbing", bert_n_emb=128, bert_n_head=4, bert_n_layers=6, ema=True)
PRIOR_TRAINING = dict(batch_size=32, lr=1e-3, warmup_iters=100)
# The columns of the table: what they are called, and the format of their numbers.
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
    """{flag: value} of what the command line gave, of these flags, as utils.display.commands.command takes them."""
    return dict(as_typed(name, getattr(H, name)) for name in H.explicit if name in names)


def as_typed(name, value):
    if isinstance(value, bool):
        return (name if value else f"no_{name}"), True
    return name, ",".join(map(str, value)) if isinstance(value, list) else shown(value)


def events(steps):
    """When a training of so many steps validates and writes."""
    often = max(1, steps // EVALUATIONS)
    return dict(steps_per_eval=often, steps_per_checkpoint=often, keep_checkpoints=2, steps_per_save_output=steps)


def commands_of(H, quantizer, seed):
    """The work of a cell: (what it is, its folder under logs/, the step that ends it, its command line)."""
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
    """Whether a part of a cell is complete. step: the last one of a training; None: measures."""
    return finished(LOGS / folder, step) if step else bool(measured(LOGS / folder))


def measured(folder):
    """The values of the last line of a folder's metrics.jsonl; {} if there is none."""
    path = folder / "metrics.jsonl"
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a disk was full, or the computer failed
            values = json.loads(line)["values"]
    return values


def train_all(H):
    """Do what is not done yet, one seed after the other, so that a stopped comparison has all quantizers."""
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
    """UserError if the folder holds a comparison with other flags: their results do not belong in one table."""
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
    """{column: value} of a finished cell."""
    folder = LOGS / H.log_dir / f"{quantizer}_{seed}"
    found = measured(folder / "measures")
    # The use of codes in the last epoch of training, over all images. A training of less than an epoch has only
    # the values of validation.
    usage = {name: [found[name], *curve(folder / "vqgan", name)][-1] for name in ("codes_used", "perplexity")}
    codes = math.prod(read_json(folder / "vqgan" / "config.json")["hparams"]["latent_shape"])
    bits = min(curve(folder / "prior", "val_bits"))
    perceptual = found["perceptual_efficientnet_lite0"]
    return dict(
        **usage, l1=found["l1"], psnr=found["psnr"], perceptual=perceptual, bits_per_code=bits,
        bits_per_picture=bits * codes,
    )  # fmt: skip


def summarised(cells):
    """[{column: value}] of all seeds -> {column: mean, column_se: standard error (if there are two seeds or more)}."""
    row = {}
    for name in COLUMNS:
        values = [cell[name] for cell in cells]
        row[name] = statistics.fmean(values)
        if len(values) > 1:
            row[f"{name}_se"] = statistics.stdev(values) / math.sqrt(len(values))
    return row


def best_of(table):
    """The quantizer to recommend. It has the fewest bits per picture among the quantizers whose L1 is within two
    standard errors of the lowest L1. table: {quantizer: what summarised returns}."""
    lowest = min(table.values(), key=lambda row: row["l1"])

    def is_close(row):
        error = math.hypot(row.get("l1_se", 0.0), lowest.get("l1_se", 0.0))
        return row["l1"] - lowest["l1"] <= 2 * error

    close = [name for name, row in table.items() if is_close(row)]
    return min(close, key=lambda name: table[name]["bits_per_picture"])


def lines_of(table):
    """The lines of the table as {first cell: text of the other cells}. All cells of a column have the same width."""
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
    """Distortion against bits per picture, uint8 (3, h, w): means with standard errors, and every training as a dot."""
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
    """The command that trains with a quantizer, for as long as here if the preset does not say how long."""
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
