"""Curves and bars as SVG, drawn by matplotlib."""

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

STYLE = {
    "axes.edgecolor": "#999",
    "axes.grid": True,
    "axes.labelcolor": "#555",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "run",
    "text.parse_math": False,
    "xtick.color": "#555",
    "ytick.color": "#555",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
COLOURS = {"train": "#2b5d8a", "validation": "#c4571b"}
FONTS = "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans'"  # matplotlib measures with the last, which is the widest
MOST_POINTS = 1500  # of a line: more are not visible
SMOOTHED = 40  # points from which a curve is smoothed; its mean is over about this share of them, 1/SMOOTHED
MANY_BARS = 40
LONGEST = 120  # characters of a title or a label


def short(text):
    """A title or a label as one line of bounded length: matplotlib is slow with long texts."""
    return " ".join(text.splitlines())[:LONGEST]


def smooth(values):
    """The running mean (n,) of values (n,), exponentially weighted and without bias at its start."""
    decay = 1 - min(1.0, 2 * SMOOTHED / len(values))
    result, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        result[i] = total / weight
    return result


def thinned(xs, ys):
    """At most MOST_POINTS of the points, evenly, the last one among them."""
    chosen = np.unique(np.linspace(0, len(xs) - 1, MOST_POINTS).round().astype(int))
    return xs[chosen], ys[chosen]


def curves(name, traces):
    """One plot of {trace: (steps, values)} as SVG text. A long trace is drawn faint, with its smoothed form."""
    with rc_context(STYLE):
        figure = Figure((5.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for trace, (xs, ys) in traces.items():
            xs, ys = np.asarray(xs, float), np.asarray(ys, float)
            colour, label = COLOURS.get(trace, COLOURS["train"]), short(trace) if len(traces) > 1 else None
            if len(xs) >= SMOOTHED and len(set(ys)) > 2:
                axes.plot(*thinned(xs, ys), color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(*thinned(xs, smooth(ys)), color=colour, linewidth=1.6, label=label)
            else:
                marker = "o" if len(xs) < 25 else None
                axes.plot(*thinned(xs, ys), color=colour, linewidth=1.4, marker=marker, markersize=3, label=label)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(traces) > 1:
            axes.legend(fontsize=8)
        return _svg(figure, name)


def bars(name, values, x=None, xlabel="", ylabel=""):
    """Bars of heights `values` (None: no bar) over x as SVG text. If there are many bars, a second plot next to them
    shows the sorted heights."""
    heights = np.array([np.nan if v is None else v for v in values], float)
    places = np.arange(len(heights)) if x is None or any(isinstance(v, str) for v in x) else np.asarray(x, float)
    with rc_context(STYLE):
        figure = Figure((5.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        if len(heights) > MANY_BARS:  # as one outline: thousands of rectangles make a page slow
            axes.fill_between(places, np.nan_to_num(heights), step="mid", color=COLOURS["train"], linewidth=0)
        else:
            axes.bar(places, heights, color=COLOURS["train"])
        if x is not None and any(isinstance(v, str) for v in x):
            axes.set_xticks(places[:MANY_BARS], [short(str(v)) for v in x[:MANY_BARS]])
        if np.nanmin(heights, initial=0.0) >= 0:
            axes.set_ylim(bottom=0)
        if name == "codebook_usage":
            ordered = np.sort(np.nan_to_num(heights))[::-1]
            axes.plot(places, ordered, color=COLOURS["validation"], linewidth=1.4, label="sorted")
            axes.legend(fontsize=8)
        axes.set_xlabel(short(xlabel))
        axes.set_ylabel(short(ylabel) if ylabel != name else "")
        return _svg(figure, name)


def _svg(figure, title):
    figure.axes[0].set_title(short(title), loc="left", fontsize=10, color="#222", fontweight="bold")
    figure.axes[0].margins(x=0.01)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace("'DejaVu Sans'", FONTS)
