"""The live visdom dashboard of a training run: curves, bars, images, hyperparameters.

The public methods only note what is to be shown and return at once. One daemon thread sends it, so that
a slow, hanging or absent server never delays a training step. Everything shown is kept in memory, in
bounded size, and sent again in full when a server comes (back) or has lost it.
"""

import bisect
import contextlib
import html
import json
import math
import os
import re
import threading

import numpy as np

from utils.address import server_address

MARKED_POINTS = 100  # shorter curves are drawn with markers: one point alone makes no line
PANE_SIZE = (256, 640)  # bounds of the longer side of an image's pane in pixels


def env_name(log_dir):
    """The name of the visdom environment of a run that logs to `log_dir` (a path or any text).

    visdom takes '/' for '_', lists 'a_b' under an environment 'a' that need not exist, and reads 'a+b' as
    two; names are part of URLs and file names. So only letters, digits, '.' and '-' are kept.
    """
    return re.sub(r"(?:[^\w.-]|_)+", "-", str(log_dir)).strip("-.")[-100:].lstrip("-.") or "main"


class _Refused(Exception):
    """A server answers, but not as visdom does when all is well."""


class _WindowGone(Exception):
    """A window sent earlier is not on the server any more."""


class _Curve:
    """The points of one trace by rising x; at most `limit`, evenly thinned, and always the newest."""

    def __init__(self, limit):
        self.limit, self.xs, self.ys, self.sent = limit, [], [], 0
        self.stride, self.count = 1, 0  # every stride-th of the `count` points put in is in xs, ys
        self.newest, self.newest_sent = None, False  # the last point (x, y) where it is not in xs, ys

    def add(self, x, y):
        """Put in a point; points at x and later are dropped: a resumed run does those steps again.

        Returns True where the curve can no longer be shown by appending to what was sent.
        """
        rewritten = self._cut(x)
        self.newest, self.newest_sent = (x, y), False
        self.count += 1
        if (self.count - 1) % self.stride:
            return rewritten
        self.xs.append(x)
        self.ys.append(y)
        if full := len(self.xs) >= self.limit:
            self.xs, self.ys, self.stride = self.xs[::2], self.ys[::2], 2 * self.stride
        if self.xs[-1] == x:
            self.newest = None
        return rewritten or full or len(self.xs) == MARKED_POINTS

    def _cut(self, x):
        if x > (self.newest[0] if self.newest else self.xs[-1] if self.xs else -math.inf):
            return False
        n = bisect.bisect_left(self.xs, x)
        del self.xs[n:], self.ys[n:]
        self.newest, self.count = None, n * self.stride
        return True

    def take(self, whole, final):
        """(xs, ys) to send now, all or only the new ones; from now on they count as sent."""
        start = 0 if whole else self.sent
        xs, ys, self.sent = self.xs[start:], self.ys[start:], len(self.xs)
        # Appended at every send, newest points that thinning leaves out would pile up on the server.
        if self.newest and (whole or (final and not self.newest_sent)):
            xs.append(self.newest[0])
            ys.append(self.newest[1])
            self.newest_sent = True
        return xs, ys


class _Window:
    """Curves that share one plot. `whole`: send all points as a replacement, not only the new ones."""

    def __init__(self, name, limit):
        self.name, self.limit, self.curves, self.whole = name, limit, {}, True

    def add(self, trace, x, y):
        new = trace not in self.curves
        curve = self.curves.setdefault(trace, _Curve(self.limit))
        self.whole |= curve.add(x, y) or new

    def take(self, final):
        """A function of the viewer that sends what is new, or None where nothing is."""
        whole, self.whole = self.whole, False
        # Appending needs an entry for every trace, in the server's order; those without news are empty.
        traces = [_trace(name, *curve.take(whole, final)) for name, curve in self.curves.items()]
        if not any(trace["x"] for trace in traces):
            return None
        win, legend = f"curves-{self.name}", list(self.curves) != [self.name]
        if whole:
            return _sender(win, traces, _layout(self.name, "step", "", legend))
        return lambda viewer: viewer.append(win, traces)


def _trace(name, xs, ys):
    mode = "lines" if len(xs) >= MARKED_POINTS // 2 else "lines+markers"
    return dict(x=xs, y=ys, name=name, type="scatter", mode=mode, marker={"size": 4})


def _layout(title, xlabel, ylabel, legend=False):
    axes = dict(xaxis={"title": xlabel}, yaxis={"title": ylabel})
    return dict(axes, title=title, showlegend=legend, margin=dict(l=60, r=60, t=60, b=60))


def _sender(win, data, layout):
    message = dict(win=win, data=data, layout=layout, opts={"title": layout["title"]})
    return lambda viewer: viewer._send(dict(message))  # a copy: visdom writes into it


def _viewer_class():
    """visdom's client, made fit for a thread: time-outs, checked answers, no output of its own."""
    import requests
    import visdom

    class Viewer(visdom.Visdom):
        def __init__(self, timeouts, **options):
            # Constructed with send=False it neither sends a request nor logs warnings. None is needed:
            # windows create their environment.
            super().__init__(send=False, raise_exceptions=True, use_incoming_socket=False, **options)
            self.send, self.timeouts, self._session = True, timeouts, requests.Session()
            self._session.trust_env = False  # no proxy of the environment between us and localhost
            if self.username:
                # Its answer is an error also where no login is needed; who is not let in learns it later.
                login = json.dumps(dict(username=self.username, password=self.password))
                self._post(f"{self.server}:{self.port}{self.base_url}", login)

        def _post(self, url, data):
            return self._session.post(url, data=data, timeout=self.timeouts, allow_redirects=False)

        def _handle_post(self, url, data=None):
            answer = self._post(url, data)
            if answer.status_code != 200:
                login = ": VISDOM_USERNAME and VISDOM_PASSWORD?" if answer.status_code == 400 else ""
                raise _Refused(f"status {answer.status_code}{login}")
            return answer.text

        def environments(self):
            try:
                return list(json.loads(self._send({}, endpoint="env_state")))
            except (TypeError, ValueError):
                raise _Refused("not what visdom answers; is it another program?") from None

        def append(self, win, traces):
            # To a window that is gone visdom would "append" by making one of the new points alone, and
            # its answer would be the same. (win_exists() would print where the connection fails.)
            if self._send({"win": win}, endpoint="win_exists") != "true":
                raise _WindowGone
            self._send(dict(win=win, data=traces, append=True), endpoint="update")

    return Viewer


class Dashboard:
    """What a run shows in one visdom environment. Methods return at once; any thread may call them.

    server: None (localhost), a host name or a URL; raises UsageError for anything else. port: int.
    env: any text, e.g. the log folder; made a valid name by env_name(), see the attribute `env`.
    enabled: False makes every method do nothing. warn: called from a thread with one line of text.
    interval: seconds between sends. backoff: shortest and longest wait after a failure in seconds.
    timeouts: seconds for (connecting, an answer). max_points: bound on the points of a curve, at least 2.
    VISDOM_USERNAME and VISDOM_PASSWORD in the environment are used as a login where both are set.
    """

    def __init__(
        self, server, port, env, enabled=True, warn=print,
        *, interval=2.0, backoff=(2.0, 30.0), timeouts=(3.0, 10.0), max_points=5000,
    ):  # fmt: skip
        self.enabled, self.env = enabled, env_name(env)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._windows, self._panes, self._changed, self._thread = {}, {}, {}, None
        if not enabled:
            return
        origin, self._port, path = server_address(server, port)
        self.address = f"{origin}:{self._port}{path}"
        self._options = dict(server=origin, port=self._port, base_url=path or "/", env=self.env)
        login = {k: os.environ.get(f"VISDOM_{k.upper()}") for k in ("username", "password")}
        self._options.update(login if all(login.values()) else {})
        self._warn, self._interval, self._backoff = warn, interval, backoff
        self._timeouts, self._max_points = timeouts, max_points
        self._viewer, self._delay, self._down, self._complained = None, backoff[0], False, False
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._thread.start()

    def scalars(self, step, values, group=None):
        """Add the point (step, value) to the curve of each name in `values`, a dict {name: number}.

        'window/trace' puts traces into one window with a legend, any other name has its own window;
        group: the window of all names. Values that are None or not finite are left out. A step not
        after the curve's last one replaces the curve from there on. Raises TypeError for non-numbers.
        """
        if not self.enabled:
            return
        step = int(step)
        points = [(k, float(v)) for k, v in values.items() if v is not None and math.isfinite(v)]
        with self._lock:
            for name, value in points:
                window, _, trace = (f"{group}/{name}" if group else name).partition("/")
                plot = self._windows.setdefault(window, _Window(window, self._max_points))
                plot.add(trace or window, step, value)

    def history(self, rows):
        """Add the points of an earlier run: dicts with 'step' and names as in scalars().

        What is not a number is passed over, and so are rows without 'step'. Call it before scalars().
        """
        for row in rows if self.enabled else ():
            numbers = {k: v for k, v in row.items() if type(v) in (int, float)}
            if math.isfinite(step := numbers.pop("step", math.nan)):
                self.scalars(step, numbers)

    def bars(self, name, values, x=None, xlabel="", ylabel=""):
        """Show bars of height `values` (n,) over `x` (n,), numbers or strings; by default 0 ... n-1.

        Only the latest of a name is kept; values not finite have no bar. Raises ValueError for other shapes.
        """
        if not self.enabled:
            return
        values = np.asarray(values, dtype=np.float64)
        x = np.arange(values.size) if x is None else np.asarray(x)
        if values.ndim != 1 or x.shape != values.shape:
            raise ValueError(f"bars {name!r}: shapes {values.shape} and {x.shape} instead of two of (n,)")
        shown = np.isfinite(values)
        data = [dict(x=x[shown].tolist(), y=values[shown].tolist(), type="bar")]
        self._put(win := f"bars-{name}", _sender(win, data, _layout(name, xlabel, ylabel)))

    def image(self, name, array, caption=None):
        """Show an RGB image (3, H, W) of 0 ... 255, clamped and copied; only the latest of a name is kept.

        Raises ValueError for other shapes.
        """
        if not self.enabled:
            return
        array = np.asarray(array)
        if array.ndim != 3 or array.shape[0] != 3 or not array.size:
            raise ValueError(f"image {name!r}: shape {array.shape} instead of (3, H, W)")
        if array.dtype != np.uint8:
            array = np.rint(np.clip(np.nan_to_num(array), 0, 255))
        array = array.astype(np.uint8)  # a copy: the caller may go on writing into its buffer
        scale = np.clip(max(array.shape), *PANE_SIZE) / max(array.shape)
        height, width = (math.ceil(n * scale) for n in array.shape[1:])
        opts = dict(width=width, height=height, title=name, caption=caption)
        self._put(win := f"image-{name}", lambda viewer: viewer.image(array, win=win, opts=dict(opts)))

    def properties(self, values):
        """Show a dict as a table of two columns, as text (nothing in it is taken for HTML)."""
        if not self.enabled:
            return
        cells = ((html.escape(str(k)), html.escape(str(v))) for k, v in values.items())
        rows = "".join(f"<tr><td>{k}&nbsp;&nbsp;</td><td>{v}</td></tr>" for k, v in cells)
        self._put("properties", lambda viewer: viewer.text(
            f"<table>{rows}</table>", win="properties", opts={"title": "properties"}))  # fmt: skip

    def close(self, timeout=5.0):
        """Send what is left and stop; after `timeout` seconds at most, give up. Never raises."""
        self.enabled = False
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        thread.join(timeout)
        if thread.is_alive():
            self._warn = lambda text: None  # printing while the interpreter shuts down can crash it

    def _put(self, win, send):
        with self._lock:
            self._panes[win] = send
            self._changed[win] = True

    # What follows runs in the thread.

    def _run(self):
        try:  # here and not at the top, because it takes seconds
            self._viewer_class = _viewer_class()
        except Exception as error:  # a broken installation fails in many ways; training goes on
            self.enabled = False
            self._say(f"visdom cannot be imported ({_describe(error)}): no dashboard")
            return
        wait = 0.0
        while not self._closing.wait(wait):
            wait = self._round(final=False)
        self._round(final=True)

    def _round(self, final):
        """Send what is new; whatever fails, only say so. Returns the seconds until the next round."""
        try:
            self._flush(final)
        except (OSError, _Refused) as error:
            self._viewer = None  # logs in anew
            self._forget()
            self._report_down(error)
            wait, self._delay = self._delay, min(2 * self._delay, self._backoff[1])
            return wait
        except Exception as error:  # a mistake in here must not end the dashboard, still less training
            self._complain(error)
        else:
            self._report_up()
        return self._interval

    def _flush(self, final):
        if self._viewer is None:
            self._viewer = self._viewer_class(self._timeouts, **self._options)
        # Asked every time, also with nothing to send: notices a server that was restarted in between.
        if self.env not in self._viewer.environments():
            self._forget()
        try:
            self._send_news(final)
        except _WindowGone:
            self._forget()
            self._send_news(final)

    def _send_news(self, final):
        with self._lock:
            sends = [window.take(final) for window in self._windows.values()]
            sends += [self._panes[win] for win in self._changed]
            self._changed = {}
        refusals = []
        for send in filter(None, sends):
            try:
                send(self._viewer)
            except _Refused as error:  # perhaps of this one alone: the others still get their turn
                refusals.append(error)
            except (OSError, _WindowGone):
                raise
            except Exception as error:  # one item that cannot be sent must not keep back the others
                self._complain(error)
        if refusals:
            raise refusals[0]

    def _forget(self):
        """Take nothing for sent: next time everything goes out in full, as a replacement."""
        with self._lock:
            for window in self._windows.values():
                window.whole = True
            self._changed = dict.fromkeys(self._panes, True)

    def _report_down(self, error):
        what = f"no visdom server answers at {self.address}"
        if isinstance(error, _Refused):
            what = f"the server at {self.address} does not accept the dashboard ({error})"
        if not self._down:
            self._say(f"{what}; start one with `visdom -port {self._port}`, or pass --no_visdom")
        self._down = True

    def _report_up(self):
        if self._down:
            self._say(f"the visdom server at {self.address} answers: the dashboard is complete")
        self._down, self._delay = False, self._backoff[0]

    def _complain(self, error):
        if not self._complained:
            self._say(f"the dashboard could not show something ({_describe(error)}); training goes on")
        self._complained = True

    def _say(self, text):
        with contextlib.suppress(Exception):  # the caller's function, in our thread
            self._warn(text)


def _describe(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
