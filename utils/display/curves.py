"""The curves of a dashboard: a limited number of points, raw and smoothed, and the plots that show them."""

import bisect
import math

from utils.display import dashboard_panes as panes

MARKED_POINTS = 100  # shorter curves are drawn with markers, because a single point draws no line
SMOOTHED_FROM = 20  # points: longer curves are also drawn smoothed
SPAN = 0.05  # the share of all points so far (at least 5 points) that the moving average covers
NEVER_SMOOTHED = ("lr", "gpu_memory_gib", "codes_used", "skipped_updates")  # steps are steps


class Curve:
    """The points of one trace by rising x; at most `limit`, evenly thinned, and always the newest.

    Each y comes with the exponential moving average so far. Its span grows with the curve, so that long and short
    curves look equally smooth; the first 5 points have equal weights. smooth=False: it is not shown.
    """

    def __init__(self, limit, smooth=True):
        self.smooth, self.limit, self.xs, self.ys, self.means, self.sent = smooth, limit, [], [], [], 0
        self.stride, self.count = 1, 0  # every stride-th of the `count` points put in is in xs, ys
        self.mean = None  # at the last point put in
        self.newest, self.newest_sent = None, False  # the last point (x, y, mean) if it is not in xs, ys
        self.smoothed = False

    def add(self, x, y):
        """Add a point. Earlier points at x and later are dropped, because a resumed run repeats those steps.

        Returns True if the curve can no longer be shown by appending to what was sent.
        """
        rewritten = self._cut(x)
        self.count += 1
        weight = 1 / min(self.count, max(5, SPAN * self.count))
        self.mean = y if self.mean is None else self.mean + weight * (y - self.mean)
        self.newest, self.newest_sent = (x, y, self.mean), False
        if (self.count - 1) % self.stride:
            return rewritten
        self.xs.append(x)
        self.ys.append(y)
        self.means.append(self.mean)
        if full := len(self.xs) >= self.limit:
            self.stride *= 2
            self.xs, self.ys, self.means = self.xs[::2], self.ys[::2], self.means[::2]
        if self.xs[-1] == x:
            self.newest = None
        before, self.smoothed = self.smoothed, self.smooth and len(self.xs) >= SMOOTHED_FROM
        return rewritten or full or len(self.xs) == MARKED_POINTS or before != self.smoothed

    def _cut(self, x):
        if x > (self.newest[0] if self.newest else self.xs[-1] if self.xs else -math.inf):
            return False
        n = bisect.bisect_left(self.xs, x)
        del self.xs[n:], self.ys[n:], self.means[n:]
        self.newest, self.count, self.mean = None, n * self.stride, self.means[-1] if n else None
        return True

    def take(self, whole, final):
        """(xs, ys, means) to send now, all or only the new ones; from now on they count as sent."""
        start = 0 if whole else self.sent
        columns, self.sent = [values[start:] for values in (self.xs, self.ys, self.means)], len(self.xs)
        # If they were appended at every send, newest points that thinning removes would accumulate on the server.
        if self.newest and (whole or (final and not self.newest_sent)):
            for column, value in zip(columns, self.newest, strict=True):
                column.append(value)
            self.newest_sent = True
        return columns


class Plot:
    """Curves that share one pane. `whole`: send all points as a replacement, not only the new ones.

    images_per_step: None, or the number of images per step, for the hover text. run: the name of the run, if others
    are shown next to it.
    """

    def __init__(self, name, limit, images_per_step=None, run=""):
        self.name, self.limit, self.images_per_step, self.run = name, limit, images_per_step, run
        self.curves, self.others, self.whole = {}, {}, True

    def add(self, trace, x, y):
        new = trace not in self.curves
        curve = self.curves.setdefault(trace, Curve(self.limit, self.name not in NEVER_SMOOTHED))
        self.whole |= curve.add(x, y) or new

    def compare(self, curves):
        """Show these curves of other runs, too: {(trace, run): Curve}."""
        self.others.update(curves)
        self.whole = True

    def take(self, final):
        """A function of the viewer that sends the new points, or None if there are none."""
        whole, self.whole = self.whole, False
        # Appending needs an entry for every trace, in the server's order; those without news are empty.
        traces = self._traces(whole, final)
        if whole:
            pane = self._pane(traces)
            return lambda viewer: viewer.whole(pane)
        if not any(trace["x"] for trace in traces):
            return None
        # Only points: a colour that is sent along would be appended to the colour.
        points = [dict(x=t["x"], y=t["y"], name=t["name"], type="scatter") for t in traces]
        news = dict(win=f"curves-{self.name}", data=points, append=True)
        return lambda viewer: viewer.append(news)

    def _traces(self, whole, final):
        traces, xs_of_run = [], None
        for number, (trace, curve) in enumerate(self.curves.items()):
            xs, ys, means = curve.take(whole, final)
            xs_of_run = xs if number == 0 else xs_of_run
            traces += self._lines(trace, self.run if self.others else "", number, curve, xs, ys, means)
        for number, ((trace, run), curve) in enumerate(self.others.items(), start=len(self.curves)):
            # Of other runs one line each: the plot is to stay readable.
            traces += self._lines(trace, run, number, curve, *curve.take(whole, final))[-1:]
        if self.images_per_step and xs_of_run is not None:
            traces.append(panes.images_trace(xs_of_run, self.images_per_step))
        return traces

    def _lines(self, trace, run, number, curve, xs, ys, means):
        """A curve, and its smoothed form last. run: '' or what else to call it by."""
        colour, marked = panes.COLOURS[number % len(panes.COLOURS)], len(curve.xs) < MARKED_POINTS
        name = f"{trace}, {run}" if run else trace
        if not curve.smoothed:
            return [panes.line_trace(name, xs, ys, colour, faint=False, marked=marked)]
        smoothed = name if run else "smoothed" if name == self.name else f"{name} (smoothed)"
        # Where the legend has other things to tell, one entry shows and hides both.
        more = dict(legendgroup=name, showlegend=False) if run else {}
        raw = panes.line_trace(f"{name} (raw)" if run else name, xs, ys, colour, faint=True, marked=marked, **more)
        more = dict(legendgroup=name) if run else {}
        return [raw, panes.line_trace(smoothed, xs, means, colour, faint=False, marked=False, **more)]

    def _pane(self, traces):
        entries = sum(trace.get("showlegend", True) for trace in traces)
        if entries == 1 and list(self.curves) == [self.name]:
            entries = 0  # the title says it
        rows = entries if self.others else math.ceil(entries / 2)  # names of runs are long
        layout = panes.curves_layout(self.name, self.images_per_step, rows)
        if not traces:
            layout = panes.empty(layout)
            traces = [panes.line_trace("", [], [], panes.COLOURS[0], faint=False, marked=False)]
        return panes.message(f"curves-{self.name}", traces, layout)
