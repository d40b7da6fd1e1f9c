"""The panes of the dashboard (plots, bars, tables, progress) as plain data for visdom and plotly.

Names of panes: 'curves-NAME', 'bars-NAME', 'image-NAME', or the name of a text. A plan lists panes that are on the page
from the start, in the order of the plan. (An open page puts new panes at its end.)
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from utils.core.progress import duration
from utils.display.curves import MARKED_POINTS, NEVER_SMOOTHED, VALIDATION, Curve
from utils.display.html import render

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
FAINT = "59"  # the opacity of pale curves, as two hexadecimal digits (FF is opaque)
IMAGES_SEEN = "images seen"
STATES = dict(starting=COLOURS[0], running=COLOURS[0], finished=COLOURS[2], stopped=COLOURS[1], failed=COLOURS[3])

# The label of the vertical axis by the name of the curves; other curves use their name.
UNITS = dict(
    loss="loss",
    l1="mean absolute error",
    perceptual="LPIPS",
    nll_loss="l1 + weight x LPIPS",
    codebook_loss="loss",
    g_loss="-D(reconstruction)",
    d_loss="hinge loss",
    d_weight="weight",
    lecam="regularisation",
    perplexity="codes, effectively",
    codes_used="codes",
    mean_distance="distance to the code",
    bits="bits per code",
    lr="learning rate",
    images_per_second="images / s",
    gpu_memory_gib="GiB",
    skipped_updates="updates",
    bits_per_dim="bits / dimension",
    loss_history="loss (latest weigh most)",
    bound_history="bound (root mean square)",
)
DISCRIMINATOR = ("g_loss", "d_loss", "d_weight")  # curves that begin at the step at which the discriminator joins
NOTHING_YET = "nothing yet"
FROM_ZERO = ("lr", "images_per_second", "gpu_memory_gib", "codes_used", "d_weight")


def plan_of(H: Any, name: str, device_type: str) -> list[str]:
    """Return the names of the panes of a training run, in the order of the page. Curves are above bars. Pictures come
    last, and are not in the list."""
    curves: list[str] = []
    bars: list[str] = []
    if name == "vqgan":
        curves = ["l1", *(["perceptual"] if H.perceptual_weight else []), "nll_loss", "codebook_loss"]
        if H.disc_start_step <= H.train_steps:
            curves += [*DISCRIMINATOR, *(["lecam"] if H.lecam_weight else [])]
        curves += ["perplexity", "codes_used", "mean_distance", "lr"]
        bars = ["codebook_usage"]
    elif name == H.sampler:
        curves = ["bits", "lr"]
    if name == "absorbing":
        bars = ["loss_history", "bound_history"]
    curves.append("images_per_second")
    if device_type == "cuda":
        curves.append("gpu_memory_gib")
    texts = ["properties", "results"] if name == "logsigma" else ["properties"]
    return ["progress", "curves-loss", *texts, *(f"curves-{c}" for c in curves), *(f"bars-{b}" for b in bars)]


def notes_of(H: Any, name: str) -> dict[str, str]:
    """Return {pane: text} for panes whose text is not NOTHING_YET. The text is shown until the pane has a point."""
    if name != "vqgan":
        return {}
    return {f"curves-{curve}": f"from step {H.disc_start_step:,} on" for curve in DISCRIMINATOR}


def pane(win: str, data: list[dict], layout: dict | None = None) -> dict[str, Any]:
    """Return a request to visdom's server that creates or replaces a pane. The request contains no size, so visdom uses
    its default size. With a size in the request, every update would undo a change of the size by the user."""
    return dict(win=win, data=data, layout=layout or {}, opts=dict(title=win.partition("-")[2] or win))


def text_pane(win: str, template: str, **values: Any) -> dict[str, Any]:
    """Return a pane with the HTML of a template."""
    return pane(win, [dict(type="text", content=render(template, **values))])


def progress_pane(run: str, step: int, total: int, state: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pane with a progress bar and a table of values. state: text that begins with one of STATES."""
    percent = 100 * min(1.0, step / max(total, 1))
    values = {"step": f"{step:,} of {total:,} ({percent:.3g}%)", **values}
    colour = STATES[state.split()[0].rstrip(",")]
    return text_pane("progress", "progress.html", run=run, state=state, colour=colour, percent=percent, values=values)


def bar_pane(win: str, xs: list, ys: list[float], xlabel: str = "", ylabel: str = "") -> dict[str, Any]:
    """Return a pane with bars of heights ys over xs (numbers or words)."""
    name = win.removeprefix("bars-")
    layout = _layout(name, xlabel, ylabel or UNITS.get(name, ""), bargap=0)
    del layout["xaxis"]["type"]
    if not ys:
        _mark_empty(layout)
    return pane(win, [dict(x=xs, y=ys, type="bar", marker=dict(color=COLOURS[0]))], layout)


def time_left(seconds: float) -> str:
    """Return a duration as text. If the end is less than a week away, the text names its day and time."""
    if seconds > 7 * 86_400:
        return duration(seconds)
    return f"{duration(seconds)}, until {time.strftime('%a %H:%M', time.localtime(time.time() + seconds))}"


class Plot:
    """Curves that share one pane. Each run has a colour; validation is dashed. The attribute `whole` is True if the
    next message must replace all points instead of adding new points.

    images_per_step: the number of images per step for the hover text, or None. run: the name of the run, which is shown
    if other runs have curves, too. note: the text of the pane until it has a point. If the note is '', the pane appears
    with the first value that is not 0, because a loss whose weight is 0 needs no pane.
    """

    LEGEND_WIDTH = 300  # the width of a legend in pixels, in a pane of visdom's default size

    def __init__(
        self, name: str, limit: int, images_per_step: int | None = None, run: str = "", note: str = ""
    ) -> None:
        self.name, self.limit, self.images_per_step, self.run = name, limit, images_per_step, run
        self.note, self.shown = note, bool(note)
        self.curves: dict[str, Curve] = {}
        self.others: dict[str, dict[str, Curve]] = {}
        self.whole = True

    def add(self, trace: str, x: int, y: float) -> None:
        self.shown = self.shown or y != 0
        if trace not in self.curves:
            self.curves[trace] = Curve(self.limit, self.name not in NEVER_SMOOTHED)
            self.whole = True
        if self.curves[trace].add(x, y):
            self.whole = True

    def compare(self, others: dict[str, dict[str, Curve]]) -> None:
        """Show the curves of other runs, too. others: {run: {trace: Curve}}, in the order of the runs' colours."""
        self.others = others
        self.whole = True

    def take(self, final: bool) -> dict[str, Any] | None:
        """Return the message that sends the new points. Return None if no point is new."""
        if not self.shown:
            return None
        whole, self.whole = self.whole, False
        # Appending needs an entry for every trace, in the server's order; traces without new points have empty entries.
        traces = self._traces(whole, final)
        win = f"curves-{self.name}"
        if whole:
            return self._pane(win, traces)
        if not any(trace["x"] for trace in traces):
            return None
        # The message holds only points, because the server would also append the values of other fields, such as a
        # colour.
        points = [dict(x=trace["x"], y=trace["y"], name=trace["name"], type="scatter") for trace in traces]
        return dict(win=win, data=points, append=True)

    def _traces(self, whole: bool, final: bool) -> list[dict[str, Any]]:
        compared = any(self.others.values())
        runs = [(self.run if compared else "", self.curves), *self.others.items()]
        traces: list[dict[str, Any]] = []
        for number, (run, curves) in enumerate(runs):
            colour = COLOURS[number % len(COLOURS)]
            for trace in sorted(curves, key=VALIDATION.__eq__):  # the curve of validation is last
                lines = self._lines(trace, run, colour, curves[trace], whole, final)
                # Each other run gets only one line, so that the plot stays readable.
                traces += lines[-1:] if number else lines
        if self.images_per_step and self.curves:
            traces.append(_images_seen(traces[0]["x"], self.images_per_step))
        return traces

    def _lines(self, trace: str, run: str, colour: str, curve: Curve, whole: bool, final: bool) -> list[dict[str, Any]]:
        """Return the lines of a curve, which are the raw form and, for long curves, the smoothed form. run: the name of
        the run in the legend, or ''."""
        xs, ys, means = curve.take(whole, final)
        mode = "lines+markers" if len(curve.points) < MARKED_POINTS else "lines"
        dash = "dash" if trace == VALIDATION else "solid"
        name = f"{trace}, {run}" if run else trace
        if not curve.smoothed:
            return [_line(name, xs, ys, colour, mode, dash)]
        raw = _line(name, xs, ys, colour + FAINT, mode, dash, width=1.2)
        smoothed = _line(name, xs, means, colour, dash=dash)
        if run:  # one entry of the legend shows and hides both lines
            raw.update(name=f"{name} (raw)", legendgroup=name, showlegend=False)
            smoothed.update(legendgroup=name)
        else:
            smoothed["name"] = "smoothed" if name == self.name else f"{name} (smoothed)"
        return [raw, smoothed]

    def _pane(self, win: str, traces: list[dict[str, Any]]) -> dict[str, Any]:
        entries = [trace["name"] for trace in traces if trace.get("showlegend", True)]
        if entries == [self.name]:
            entries = []  # the title names the curve, so no legend is needed
        longest = max(map(len, entries), default=0)
        columns = max(1, self.LEGEND_WIDTH // (40 + 6 * longest))  # 40 pixels for a line, 6 for a character
        layout = _curves_layout(self.name, self.images_per_step, math.ceil(len(entries) / columns))
        if not traces:
            _mark_empty(layout, self.note)
            traces = [_line("", [], [], COLOURS[0])]
        return pane(win, traces, layout)


def _line(
    name: str,
    xs: Sequence[float],
    ys: Sequence[float],
    colour: str,
    mode: str = "lines",
    dash: str = "solid",
    width: float = 2,
) -> dict[str, Any]:
    """Return one curve for plotly. (The button '~' of visdom's page smooths curves, and needs the field
    marker.line.)"""
    line, marker = dict(color=colour, width=width, dash=dash), dict(size=4, color=colour, line={})
    return dict(x=xs, y=ys, name=name, type="scatter", mode=mode, line=line, marker=marker)


def _images_seen(xs: list[int], images_per_step: int) -> dict[str, Any]:
    """Return an invisible trace from which the hover text reads the number of images seen."""
    trace = _line(IMAGES_SEEN, xs, [x * images_per_step for x in xs], "rgba(0,0,0,0)")
    return dict(trace, yaxis="y2", showlegend=False, hovertemplate="%{y:,} images seen<extra></extra>")


def _layout(title: str, xlabel: str = "", ylabel: str = "", **more: Any) -> dict[str, Any]:
    """Return plotly's layout of a small plot."""
    axis = dict(type="linear", exponentformat="power", automargin=True, zeroline=False)
    return dict(
        title=dict(text=title, x=0.02, xanchor="left", y=0.97, yanchor="top", font=dict(size=15)),
        xaxis=dict(axis, title=dict(text=xlabel, standoff=8), exponentformat="SI"),
        yaxis=dict(axis, title=dict(text=ylabel, standoff=8), rangemode="tozero" if title in FROM_ZERO else "normal"),
        margin=dict(l=55, r=15, t=55, b=45),
        showlegend=False,
        **more,
    )


def _curves_layout(name: str, images_per_step: int | None, legend_rows: int) -> dict[str, Any]:
    """Return the layout of curves over steps. The hover text shows all values at a step, and the number of images seen
    so far. legend_rows: the number of rows of the legend between the title and the plot. With 0 rows there is no
    legend."""
    xlabel = "step"
    if images_per_step:
        xlabel = f"step ({images_per_step:,} image{'s' if images_per_step > 1 else ''} each)"
    layout = _layout(name, xlabel, UNITS.get(name, name), hovermode="x unified", hoverlabel=dict(namelength=-1))
    layout["showlegend"] = legend_rows > 0
    layout["margin"]["t"] = 37 + 18 * max(1, legend_rows)
    position = dict(x=1, xanchor="right", y=1, yanchor="bottom")
    layout["legend"] = dict(position, orientation="h", font=dict(size=11), tracegroupgap=0)
    layout["yaxis2"] = dict(
        overlaying="y", visible=False, fixedrange=True
    )  # for the images seen, which only the hover text shows
    return layout


def _mark_empty(layout: dict[str, Any], text: str = NOTHING_YET) -> None:
    """Show this text in a plot without points."""
    layout["xaxis"]["showticklabels"] = layout["yaxis"]["showticklabels"] = False
    note = dict(text=text, xref="paper", yref="paper", x=0.5, y=0.5, showarrow=False)
    layout["annotations"] = [dict(note, font=dict(color="#999", size=14))]
