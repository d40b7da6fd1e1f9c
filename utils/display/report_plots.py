"""Draws curves and bars as SVG with matplotlib."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from utils.display.curves import NEVER_SMOOTHED, VALIDATION, Curve

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.xmargin": 0.01,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "run",  # equal data give equal SVG files
    "text.parse_math": False,
}
MOST_POINTS = 1500  # the most points of a line, because more points are not visible
MOST_LABELS = 40  # the most bars that have labels
LONGEST = 120  # the most characters of a title or a label, because long texts make matplotlib slow


def curves(name: str, traces: dict[str, tuple[list[float], list[float]]]) -> str:
    """Draw one plot of {trace: (steps, values)} as SVG text. All traces have one colour, and validation is dashed. A
    long trace is pale, and its smoothed form is drawn over the pale line."""
    with rc_context(STYLE):
        figure, axes = _new_plot(name)
        for trace, (xs, ys) in sorted(traces.items(), key=lambda item: item[0] == VALIDATION):
            curve = Curve(MOST_POINTS, name not in NEVER_SMOOTHED)
            for x, y in zip(xs, ys):
                curve.add(float(x), y)
            xs, ys, means = curve.take(whole=True, final=True)
            style: dict[str, Any] = dict(color="C0", linestyle="--" if trace == VALIDATION else "-")
            (line,) = axes.plot(xs, ys, linewidth=1.4, label=_short(trace), **style)
            if curve.smoothed:
                line.set(alpha=0.3, linewidth=0.8, label=None)
                axes.plot(xs, means, linewidth=1.6, label=_short(trace), **style)
            elif len(xs) < 25:
                line.set(marker="o", markersize=3)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(traces) > 1:
            axes.legend()
        return _svg(figure)


def bars(name: str, values: list[Any], x: Sequence[Any] = (), xlabel: str = "", ylabel: str = "") -> str:
    """Draw bars of heights `values` over x as SVG text. A value of None has no bar. The bars of the codebook's usage
    are drawn a second time in sorted order."""
    heights, words = np.array(values, float), any(isinstance(v, str) for v in x)
    places = np.arange(len(heights)) if words or not x else np.array(x, float)
    with rc_context(STYLE):
        figure, axes = _new_plot(name)
        # Draw one outline, because thousands of rectangles would make the page slow.
        edges = np.concatenate([[places[0] - 0.5], (places[1:] + places[:-1]) / 2, [places[-1] + 0.5]])
        axes.stairs(heights, edges, fill=True)
        if words:
            axes.set_xticks(places[:MOST_LABELS], [_short(v) for v in x[:MOST_LABELS]])
        if name == "codebook_usage":
            axes.plot(places, np.sort(np.nan_to_num(heights))[::-1], color="#444444", label="sorted")
            axes.legend()
        axes.set_xlabel(_short(xlabel))
        axes.set_ylabel(_short(ylabel) if ylabel != name else "")
        return _svg(figure)


def _short(text: Any) -> str:
    """Convert a title or a label to one line of bounded length."""
    return " ".join(str(text).splitlines())[:LONGEST]


def _new_plot(title: str) -> tuple[Figure, Axes]:
    figure = Figure((5.4, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_short(title))
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
