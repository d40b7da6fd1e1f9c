"""The panes of the dashboard (plots, bars, tables, progress) as plain data for visdom and plotly.

Names of panes: 'curves-NAME', 'bars-NAME', 'image-NAME', or the name of a text. Those of a plan are on the page from
the start, in its order: an open page puts a pane that comes later at its end.
"""

import html
import time

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
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


FROM_ZERO = ("lr", "images_per_second", "gpu_memory_gib", "codes_used", "d_weight")


def plan_of(H, name, device_type):
    """The panes that a training run will have, in order: the curves above, bars below; pictures come last."""
    if name == "vqgan":
        adversarial = ("g_loss", "d_loss", "d_weight") if H.disc_start_step <= H.train_steps else ()
        curves = [
            "l1",
            "perceptual",
            "nll_loss",
            "codebook_loss",
            *adversarial,
            "perplexity",
            "codes_used",
            "mean_distance",
            "lr",
        ]
        bars = ["codebook_usage"]
    else:
        curves = ["bits", "lr"] if name == H.sampler else []
        bars = ["loss_history", "bound_history"] if name == "absorbing" else []
    curves += ["images_per_second", *(["gpu_memory_gib"] if device_type == "cuda" else [])]
    results = ["results"] if name == "logsigma" else []
    return [
        "progress",
        "curves-loss",
        "properties",
        *results,
        *(f"curves-{c}" for c in curves),
        *(f"bars-{b}" for b in bars),
    ]


def message(win, data, layout=None):
    """A request to visdom's server that makes or replaces a pane, in the size that it gives to its kind: at every
    update the page would set one of ours again, whatever its user has dragged, and its grid knows whole cells only."""
    return dict(win=win, data=data, layout=layout or {}, opts=dict(title=win.partition("-")[2] or win))


def plot_layout(title, xlabel="", ylabel="", **more):
    """plotly's layout of a small plot."""
    axis = dict(type="linear", exponentformat="power", automargin=True, zeroline=False)
    return dict(
        title=dict(text=title, x=0.02, xanchor="left", y=0.97, yanchor="top", font=dict(size=15)),
        xaxis=dict(axis, title=dict(text=xlabel, standoff=8), exponentformat="SI"),
        yaxis=dict(axis, title=dict(text=ylabel, standoff=8), rangemode="tozero" if title in FROM_ZERO else "normal"),
        margin=dict(l=55, r=15, t=55, b=45),
        showlegend=False,
        **more,
    )


def curves_layout(name, images_per_step, legend_rows):
    """The layout of curves over steps; hovering shows all values at a step, and the images seen until then.
    legend_rows: of the legend, which stands between the title and the plot; 0: there is none."""
    xlabel = "step" if not images_per_step else f"step ({images_per_step:,} image{'s' * (images_per_step > 1)} each)"
    layout = plot_layout(name, xlabel, UNITS.get(name, name), hovermode="x unified")
    layout["showlegend"] = legend_rows > 0
    layout["margin"]["t"] = 37 + 18 * max(1, legend_rows)
    layout["legend"] = dict(
        orientation="h", x=1, xanchor="right", y=1, yanchor="bottom", font=dict(size=11), tracegroupgap=0
    )
    layout["hoverlabel"] = dict(namelength=-1)
    layout["yaxis2"] = dict(overlaying="y", visible=False, fixedrange=True)  # of the images seen, which only hover
    return layout


def empty(layout):
    """The layout of a plot without points."""
    note = dict(text="nothing yet", xref="paper", yref="paper", x=0.5, y=0.5, showarrow=False)
    note["font"] = dict(color="#999", size=14)
    axes = {axis: dict(layout[axis], showticklabels=False) for axis in ("xaxis", "yaxis")}
    return dict(layout, **axes, annotations=[note])


def line_trace(name, xs, ys, colour, faint, marked, **more):
    """One curve. (visdom's own smoothing, the page's '~', wants marker.line.)"""
    shade = f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.35)" if faint else colour
    return dict(
        x=xs,
        y=ys,
        name=name,
        type="scatter",
        mode="lines+markers" if marked else "lines",
        line=dict(color=shade, width=1.2 if faint else 2),
        marker=dict(size=4, color=shade, line={}),
        **more,
    )


def images_trace(xs, images_per_step):
    """An invisible trace from which the hover text reads the images seen."""
    clear = dict(color="rgba(0,0,0,0)")
    return dict(
        x=xs,
        y=[x * images_per_step for x in xs],
        name=IMAGES_SEEN,
        type="scatter",
        mode="lines",
        yaxis="y2",
        line=clear,
        marker=dict(clear, line={}),
        showlegend=False,
        hovertemplate="%{y:,} images seen<extra></extra>",
    )


def bar_pane(win, xs, ys, xlabel="", ylabel=""):
    """Bars of heights ys over xs (numbers or words)."""
    name = win.removeprefix("bars-")
    layout = plot_layout(name, xlabel, ylabel or UNITS.get(name, ""), bargap=0)
    del layout["xaxis"]["type"]
    if not ys:
        layout = empty(layout)
    return message(win, [dict(x=xs, y=ys, type="bar", marker=dict(color=COLOURS[0]))], layout)


def text_pane(win, content):
    """A pane of HTML."""
    return message(win, [dict(type="text", content=content)])


def table(values):
    """A dict as a table of two columns in HTML, as text (nothing in it is taken for HTML)."""
    cells = ((html.escape(str(k)), html.escape(str(v))) for k, v in values.items())
    style = "font-weight:normal;vertical-align:top;padding:1px"
    rows = "".join(
        f'<tr><td style="{style} 10px 1px 0;color:#777">{k}</td>'
        f'<td style="{style};color:#222;word-break:break-word">{v}</td></tr>'
        for k, v in cells
    )
    return f'<table style="font-size:12px;margin:6px 8px">{rows}</table>'


def progress_text(about, step, total, state, values):
    """A bar, and a table of values. about: a title; state: a word like those of STATES, and perhaps more."""
    share = min(1.0, step / max(total, 1))
    colour = STATES[state.split()[0].rstrip(",")]
    head = f'<div style="font-size:16px;margin:10px;color:#222"><b>{html.escape(about)}</b>: {html.escape(state)}</div>'
    bar = (
        '<div style="background:#e8e8e8;height:16px;border-radius:8px;overflow:hidden;margin:10px">'
        f'<div style="background:{colour};height:16px;width:{100 * share:.1f}%"></div></div>'
    )
    return head + bar + table({"step": f"{step:,} of {total:,} ({100 * share:.3g}%)", **values})


def duration(seconds):
    """45 s, 12 min, 3 h 20 min, 5 d 2 h."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440:,} d {minutes % 1440 // 60} h"


def time_left(seconds):
    """How long, and within a week when that will be."""
    if seconds > 7 * 86_400:
        return duration(seconds)
    return f"{duration(seconds)}, until {time.strftime('%a %H:%M', time.localtime(time.time() + seconds))}"
