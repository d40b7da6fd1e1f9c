"""Writes logs/<log_dir>/report.html from a saved run. The report is one file that includes its pictures, for phones and
printers."""

import base64
import io
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.core.checkpoint import LOGS
from utils.core.errors import printable
from utils.core.files import atomic_write
from utils.core.progress import duration
from utils.display import commands
from utils.display.html import as_text, render
from utils.display.run_files import is_number
from utils.display.saved_run import LARGEST, SavedRun, reduced

KINDS = {
    "train_vqgan": "Stage 1: VQGAN",
    "train_sampler": "Stage 2: prior over codes",
    "calc_approximate_ELBO": "Approximate ELBO",
}
# The report shows these curves first, in this order. Other curves follow, sorted by name.
FIRST = "loss bits nll_loss l1 perceptual codebook_loss perplexity codes_used g_loss d_loss d_weight".split()
# At most MOST_LARGE of these numbers are shown under the title. A value of validation (`val_...`) replaces the value of
# training.
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
MOST_CHECKPOINTS = 12
HEAVIEST = 3 << 20  # bytes; larger pictures are compressed


def report_at_end(folder: str | Path, say: Callable[[str], None]) -> None:
    """Write the report of a run's folder at the end of a command. An error becomes a warning, because all results are
    already written."""
    try:
        say(f"report: {write_report(SavedRun(folder))}")
    except Exception as error:  # the disk, Pillow or matplotlib can cause an error
        again = commands.show_run(os.path.relpath(folder, LOGS))
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        say(f"warning: {os.path.join(folder, 'report.html')} could not be written ({reason}); to try again:\n  {again}")


def write_report(run: SavedRun) -> str:
    """Write report.html into the folder of a SavedRun; returns its path."""
    kind = KINDS.get(run.script) or (as_text(run.metrics[-1].get("metric")) if run.metrics else "Run")
    last: Any = run.hparams.get("train_steps")
    finished = bool(run.steps) and is_number(last) and run.steps[-1] >= last
    more = dict(train_steps=2 * last) if finished else {}
    text = render(
        "report.html",
        title=printable(run.name),
        kind=kind,
        lead=list(_lead(run)),
        numbers=_large_numbers(run),
        pictures=list(_pictures(run)),
        curves=list(_curves(run)),
        bars=list(_bars(run)),
        metrics=[_metrics_row(row) for row in run.metrics],
        checkpoints=run.checkpoints(MOST_CHECKPOINTS),
        n_checkpoints=len(run.steps),
        finished=finished,
        command=printable(commands.resume(run.script, run.hparams, **more) or ""),
        arguments=run.arguments(),
        log="\n".join(run.log),
        folder=run.folder,
        notes=run.notes,
    )
    path = os.path.join(run.folder, "report.html")
    with atomic_write(path) as f:
        f.write(text.encode("utf-8", "backslashreplace"))
    return path


def _lead(run: SavedRun) -> Iterator[str]:
    """Yield the sentences under the title."""
    facts, step = run.facts, run.last_step()
    data, batch = as_text(run.hparams.get("dataset")), as_text(run.hparams.get("batch_size"))
    if is_number(facts.get("parameters")):
        items, of, precision, device, torch = (
            as_text(facts.get(name)) for name in ("items", "of", "precision", "device", "torch")
        )
        yield (
            f"{facts['parameters'] / 1e6:.1f} million parameters, {items} {of} of '{data}', {precision} on {device}, "
            f"batches of {batch}, PyTorch {torch}."
        )
    elif run.hparams:
        yield f"Data set '{data}', batches of {batch}."
    last = run.hparams.get("train_steps")
    if step and is_number(last):
        sentence = f"{'Finished' if step >= last else 'Not finished'}: step {step:,} of {last:,}"
        if seconds := run.seconds():
            sentence += f" after {duration(seconds)} of training"
        rates = [row["images_per_second"] for row in run.speed if is_number(row.get("images_per_second"))]
        if rates:
            sentence += f", {statistics.median(rates):.3g} images per second"
        yield f"{sentence}."
    if run.is_empty():
        yield f"Nothing is written yet: there are no curves, pictures, metrics or checkpoints in {run.folder}."


def _large_numbers(run: SavedRun) -> dict[str, str]:
    """Return {description: last value} of the most important curves."""
    latest = run.latest()
    chosen = [name for name in LARGE if name in latest and not (f"val_{name}" in LARGE and f"val_{name}" in latest)]
    return {LARGE[name]: f"{latest[name]:.4g}" for name in chosen[:MOST_LARGE]}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _pictures(run: SavedRun) -> Iterator[tuple[str, str, int]]:
    """Yield (data URI, caption, width in pixels) of each picture. Large pictures are reduced."""
    for picture in run.pictures():
        image = run.open(picture)
        if image is None:
            continue
        if (max(image.size) <= LARGEST or image.format == "GIF") and os.path.getsize(picture.path) <= HEAVIEST:
            kind = str(image.format).lower()
            with open(picture.path, "rb") as f:
                content = f.read()
        else:
            kind, buffer = "jpeg", io.BytesIO()
            image = reduced(image)
            image.save(buffer, format="JPEG", quality=88)
            content = buffer.getvalue()
        yield _data_uri(kind, content), printable(picture.caption), image.size[0]


def _curves(run: SavedRun) -> Iterator[tuple[str, str]]:
    """Yield (name, data URI) of the plot of each curve."""
    traces = run.traces()
    for name in sorted(traces, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        if source := _plot(run, name, "curves", traces[name]):
            yield name, source


def _bars(run: SavedRun) -> Iterator[tuple[str, str]]:
    """Yield (name, data URI) of the plot of each group of bars."""
    for name, bar in run.bars.items():
        labels = [printable(bar.get(label, "")) for label in ("xlabel", "ylabel")]
        if source := _plot(run, name, "bars", bar["values"], bar.get("x") or (), *labels):
            yield name, source


def _plot(run: SavedRun, name: str, kind: str, *args: Any) -> str | None:
    """Return a plot as a data URI. If matplotlib cannot draw the plot, add a note and return None. (A file may hold
    huge numbers.) kind: the name of a function of report_plots."""
    from utils.display import report_plots  # imported here, so that a run does not load matplotlib before its end

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # matplotlib warns of glyphs that a font lacks
            return _data_uri("svg+xml", getattr(report_plots, kind)(name, *args).encode())
    except Exception as error:  # matplotlib can raise any exception for huge numbers
        run.note(f"'{name}' cannot be drawn ({type(error).__name__})")
        return None


def _metrics_row(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Convert a row of metrics.jsonl to (name of the metric, date, result, measured models)."""
    values, results = row["values"], []
    for name, value in values.items():
        if not name.endswith("_se"):
            error = f" \u00b1 {as_text(values[f'{name}_se'])}" if f"{name}_se" in values else ""
            results.append(f"{printable(name)} {as_text(value)}{error}")
    sources = [row[key] for key in ("checkpoints", "feature_files") if isinstance(row.get(key), dict)]
    files = [file for source in sources for file in source.values() if isinstance(file, dict)]
    names = [os.path.basename(as_text(file.get("path"))) for file in files]
    when = as_text(row.get("time"))[:16].replace("T", " ")
    return as_text(row.get("metric")), when, ", ".join(results), ", ".join(names)
