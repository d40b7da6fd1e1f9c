"""A recorded run -> logs/<log_dir>/report.html."""

import os
import statistics
import warnings

from utils.core.errors import printable
from utils.core.files import atomic_write
from utils.core.progress import duration
from utils.display import commands, html, plots
from utils.display.recorded import when
from utils.display.records import is_number

KINDS = {
    "train_vqgan": "Stage 1: VQGAN",
    "train_sampler": "Stage 2: prior over codes",
    "calc_approximate_ELBO": "Approximate ELBO",
}
FIRST = (
    "loss",
    "bits",
    "nll_loss",
    "l1",
    "perceptual",
    "codebook_loss",
    "perplexity",
    "codes_used",
    "g_loss",
    "d_loss",
    "d_weight",
)
LARGE = dict(
    val_bits="bits per code, validation",
    bits="bits per code",
    val_l1="mean absolute error, validation",
    l1="mean absolute error",
    loss="loss",
    codes_used="codes in use",
    perplexity="perplexity",
)
MOST_LARGE = 5
NARROW = 700  # pixels: two such pictures stand side by side
MOST_CHECKPOINTS = 12


def text(value):
    """Any JSON value as words."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return " ".join(map(text, value))
    if isinstance(value, dict):
        return ", ".join(f"{printable(k)} {text(v)}" for k, v in value.items())
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return printable(value)


def lead(run):
    """The sentences under the title."""
    facts, step = run.facts, run.step()
    if is_number(facts.get("parameters")):
        yield (
            f"{facts['parameters'] / 1e6:.1f} million parameters, {text(facts.get('items'))} {text(facts.get('of'))} "
            f"of '{text(run.hparams.get('dataset'))}', {text(facts.get('precision'))} on {text(facts.get('device'))}, "
            f"batches of {text(run.hparams.get('batch_size'))}, PyTorch {text(facts.get('torch'))}."
        )
    elif run.hparams:
        yield f"Data set '{text(run.hparams.get('dataset'))}', batches of {text(run.hparams.get('batch_size'))}."
    last = run.hparams.get("train_steps")
    if step and is_number(last):
        state = "Finished" if step >= last else "Not finished"
        done = f"{state}: step {step:,} of {last:,}"
        rates = [r["images_per_second"] for r in run.speed if is_number(r.get("images_per_second"))]
        pace = f", {statistics.median(rates):.3g} images per second" if rates else ""
        seconds = run.seconds()
        yield done + (f" after {duration(seconds)} of training" if seconds else "") + pace + "."
    if run.is_empty():
        yield f"Nothing is written yet: there are no curves, pictures, metrics or checkpoints in {run.folder}."


def large_figures(run):
    latest = run.latest()
    chosen = [name for name in LARGE if name in latest and not {f"val_{name}"} & LARGE.keys() & latest.keys()]
    return {LARGE[name]: f"{latest[name]:.4g}" for name in chosen[:MOST_LARGE]}


def drawn(run, name, draw, *args):
    """The plot, or nothing and a note: a file may hold numbers that no axis has room for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that a font lacks
            return html.plot(draw(printable(name), *args), name)
    except Exception as error:  # whatever matplotlib makes of them
        run.notes.append(f"'{printable(name)}' cannot be drawn ({type(error).__name__})")
        return ""


def curve_plots(run):
    traces = {name: t for name, t in run.traces().items() if any(any(values) for _, values in t.values())}
    names = sorted(traces, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return [drawn(run, name, plots.curves, traces[name]) for name in names]


def bar_plots(run):
    return [
        drawn(
            run,
            name,
            plots.bars,
            bar["values"],
            bar.get("x"),
            printable(bar.get("xlabel", "")),
            printable(bar.get("ylabel", "")),
        )
        for name, bar in run.bars.items()
    ]


def picture_figures(run):
    for picture in run.pictures():
        if (found := picture.embedded()) is not None:
            kind, content, width = found
            place = "half" if width < NARROW else "whole"
            yield html.figure(html.data_uri(kind, content), printable(picture.caption), place=place)


def metrics_table(run):
    rows = []
    for row in run.metrics:
        values = row["values"]
        shown = []
        for name, value in values.items():
            if not name.endswith("_se"):
                error = f" \u00b1 {text(values[f'{name}_se'])}" if f"{name}_se" in values else ""
                shown.append(f"{printable(name)} {text(value)}{error}")
        files = [row[name] for name in ("checkpoints", "feature_files") if isinstance(row.get(name), dict)]
        of = [text(f.get("path")) for found in files for f in found.values() if isinstance(f, dict)]
        rows.append(
            [
                text(row.get("metric")),
                text(row.get("time"))[:16].replace("T", " "),
                ", ".join(shown),
                ", ".join(os.path.basename(path) for path in of),
            ]
        )
    return html.table(("metric", "when", "result", "of"), rows)


def checkpoints_section(run):
    found = run.checkpoints(MOST_CHECKPOINTS)
    rows = [[f"step {step:,}", f"{size / 2**20:.1f} MiB", when(time)] for step, size, time in found]
    left_out = f"The newest {len(found)} of {len(run.steps)}." if len(run.steps) > len(found) else ""
    again, last = commands.resume(run.script, run.hparams), run.hparams.get("train_steps")
    how = ""
    if again and found:
        how = "Resume from the newest complete checkpoint, in the repository's root:"
        if is_number(last) and found[-1][0] >= last:
            how = "Train for longer, from the newest complete checkpoint, in the repository's root:"
            again = commands.resume(run.script, run.hparams, train_steps=2 * last)
    return html.section(
        "Checkpoints",
        html.table((), rows).replace("<tr></tr>", ""),
        html.paragraph(left_out),
        html.paragraph(how),
        html.code(printable(again)) if how else "",
    )


def write_report(run):
    """Write report.html into the run's folder; returns its path."""
    arguments = run.hparams or run.newest_arguments()
    sections = [
        html.section("Pictures", html.row(picture_figures(run))),
        html.section("Curves", html.grid(figures) if any(figures := curve_plots(run)) else ""),
        html.section("Bars", html.grid(figures) if any(figures := bar_plots(run)) else ""),
        html.section("Metrics", metrics_table(run)),
        checkpoints_section(run),
        html.section("Hyperparameters", html.pairs({printable(k): text(v) for k, v in arguments.items()})),
        html.folded("The last lines of log.txt", "\n".join(run.log)),
    ]
    kind = KINDS.get(run.script) or (text(run.metrics[-1].get("metric")) if run.metrics else "Run")
    foot = f"Made from {run.folder} by experiments/show_run.py."
    whole = html.page(printable(run.name), kind, lead(run), large_figures(run), run.notes, sections, foot)
    path = os.path.join(run.folder, "report.html")
    with atomic_write(path) as f:
        f.write(whole.encode("utf-8", "backslashreplace"))
    return path
