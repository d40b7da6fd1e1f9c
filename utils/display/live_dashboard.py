"""The live visdom dashboard of a training run: curves, bars, images, hyperparameters.

The public methods only store what to show and return at once. A daemon thread sends it, so that a slow,
hanging or absent server never delays a training step. Everything shown is kept in memory, in limited size,
and is sent again in full when a server appears, returns, or has lost it.
"""

import contextlib
import hashlib
import math
import os
import re
import threading
from pathlib import Path

import numpy as np

from utils.core.address import server_address
from utils.display import dashboard_panes as panes
from utils.display.curves import Curve, Plot
from utils.display.visdom_client import Refused, WindowGone, viewer_class

COMPARED_POINTS = 1000  # of each curve of another run
PANE_SIZE = (256, 640)  # bounds of the longer side of an image's pane in pixels


SEPARATORS = {"_": "-", "-": "--", "/": "---"}
ORDINARY = re.compile(r"[^\W_](?:[^\W_]|[._/-](?=[^\W_]))*")
LONGEST = 100  # characters


def env_name(log_dir):
    """The name of the visdom environment of a run that logs to `log_dir` (a path or any text); different for each.

    visdom replaces '/' by '_', lists 'a_b' under an environment 'a' that need not exist, and reads 'a+b' as two names.
    Names are also part of URLs and file names. Therefore names consist of letters, digits, '.' and '-'. The number of
    hyphens encodes which of SEPARATORS was replaced. A name with other separators ends with four hyphens and a hash.
    """
    text = Path(log_dir).as_posix()
    name = re.sub(r"[_/-]", lambda match: SEPARATORS[match[0]], text)
    if ORDINARY.fullmatch(text) and len(name) <= LONGEST:
        return name
    name = re.sub(r"(?:[^\w.-]|_)+", "-", text).strip("-.")[-LONGEST:].lstrip("-.") or "run"
    return f"{name}----{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class Dashboard:
    """What a run shows in one visdom environment. Methods return at once; any thread may call them.

    server: None (localhost), a host name or a URL; raises UsageError for anything else. port: int.
    env: any text, e.g. the log folder; made a valid name by env_name(), see the attribute `env`.
    plan: names of panes (utils/display/dashboard_panes.py) that are to be on the page from the start, in this order.
    images_per_step: if given, the curves also show the number of images seen.
    enabled: False makes every method do nothing. warn: called from a thread with one line of text.
    interval: seconds between sends. backoff: shortest and longest wait after a failure in seconds.
    timeouts: seconds for (connecting, an answer). max_points: bound on the points of a curve, at least 2.
    VISDOM_USERNAME and VISDOM_PASSWORD in the environment are used as a login where both are set. The attribute
    `url` is the page's address (None: not enabled).
    """

    def __init__(
        self,
        server,
        port,
        env,
        enabled=True,
        warn=print,
        *,
        plan=(),
        images_per_step=None,
        interval=2.0,
        backoff=(2.0, 30.0),
        timeouts=(3.0, 10.0),
        max_points=5000,
    ):
        self.enabled, self.env = enabled, env_name(env)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._plots, self._panes, self._changed, self._thread = {}, {}, {}, None
        self._env_text, self._others, self.url = str(env), {}, None
        if not enabled:
            return
        origin, self._port, path = server_address(server, port)
        self.address = f"{origin}:{self._port}{path}"
        self.url = f"{self.address}/env/{self.env}"
        self._options = dict(server=origin, port=self._port, base_url=path or "/", env=self.env)
        login = {k: os.environ.get(f"VISDOM_{k.upper()}") for k in ("username", "password")}
        self._options.update(login if all(login.values()) else {})
        self._warn, self._interval, self._backoff = warn, interval, backoff
        self._timeouts, self._max_points = timeouts, max_points
        self._images_per_step, self._plan = images_per_step, {win: rank for rank, win in enumerate(plan)}
        self._viewer, self._delay, self._down, self._complained = None, backoff[0], False, False
        self._put_placeholders()
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
                self._plot(window).add(trace or window, step, value)

    def history(self, rows):
        """Add the points of an earlier run: dicts with 'step' and names as in scalars().

        Values that are not numbers and rows without 'step' are skipped. Call it before scalars().
        """
        for row in rows if self.enabled else ():
            if numbers := _numbers(row):
                self.scalars(row["step"], numbers)

    def compare(self, run, rows):
        """Show the curves of another run in the plots of this one: `rows` as of history(); `run`: its name.

        Curves without a plot in this run are left out. Call it before the first point.
        """
        curves = {}
        for row in rows if self.enabled else ():
            for name, value in _numbers(row).items():
                window, _, trace = name.partition("/")
                key = (trace or window, run)
                curves.setdefault(window, {}).setdefault(key, Curve(COMPARED_POINTS)).add(row["step"], float(value))
        with self._lock:
            for window, found in curves.items():
                self._others.setdefault(window, {}).update(found)
                if window in self._plots:
                    self._plots[window].compare(found)

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
        win = f"bars-{name}"
        self._put(win, _whole(panes.bar_pane(win, x[shown].tolist(), values[shown].tolist(), xlabel, ylabel)))

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
        array = array.astype(np.uint8)  # a copy: the caller may write into its buffer again
        scale = np.clip(max(array.shape), *PANE_SIZE) / max(array.shape)
        height, width = (math.ceil(n * scale) for n in array.shape[1:])
        # The page would show a caption twice, over the picture's edges: it stands in the title.
        opts = dict(width=width, height=height, title=caption or name)
        self._put(win := f"image-{name}", lambda viewer: viewer.image(array, win=win, opts=dict(opts)))

    def properties(self, values, name="properties"):
        """Show a dict as a table of two columns, as text (nothing in it is taken for HTML)."""
        if self.enabled:
            self._put(name, _whole(panes.text_pane(name, panes.table(values))))

    def progress(self, step, total, values, state="running"):
        """Show how far a run is; values: {name: value} to stand below; state: begins with one of panes.STATES."""
        if self.enabled:
            text = panes.progress_text(self._env_text, step, total, state, values)
            self._put("progress", _whole(panes.text_pane("progress", text)))

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

    def _plot(self, window):
        """The plot of this name, created if it does not exist."""
        if window not in self._plots:
            self._plots[window] = plot = Plot(window, self._max_points, self._images_per_step, self._env_text)
            plot.compare(self._others.get(window, {}))
        return self._plots[window]

    def _put_placeholders(self):
        for win in self._plan:
            kind, _, name = win.partition("-")
            if kind == "curves":
                self._plot(name)
            elif kind == "bars":
                self._put(win, _whole(panes.bar_pane(win, [], [])))
            else:
                self._put(win, _whole(panes.text_pane(win, "")))

    def _put(self, win, send):
        with self._lock:
            self._panes[win] = send
            self._changed[win] = True

    # What follows runs in the thread.

    def _run(self):
        try:  # here and not at the top, because it takes seconds
            self._viewer_class = viewer_class()
        except Exception as error:  # a broken installation fails in many ways; training continues
            self.enabled = False
            self._say(f"visdom cannot be imported ({_describe(error)}): no dashboard")
            return
        wait = 0.0
        while not self._closing.wait(wait):
            wait = self._round(final=False)
        self._round(final=True)

    def _round(self, final):
        """Send what is new; report a failure, but never raise. Returns the seconds until the next round."""
        try:
            self._flush(final)
        except (OSError, Refused) as error:
            self._viewer = None  # logs in anew
            self._forget()
            self._report_down(error)
            wait, self._delay = self._delay, min(2 * self._delay, self._backoff[1])
            return wait
        except Exception as error:  # an error in here must end neither the dashboard nor training
            self._complain(error)
        else:
            self._report_up()
        return self._interval

    def _flush(self, final):
        if self._viewer is None:
            self._viewer = self._viewer_class(self._timeouts, **self._options)
        # Ask every time, even with nothing to send, to notice that the server was restarted.
        if self.env not in self._viewer.environments():
            self._forget()
        try:
            self._send_news(final)
        except WindowGone:
            self._forget()
            self._send_news(final)

    def _send_news(self, final):
        with self._lock:
            sends = {f"curves-{name}": plot.take(final) for name, plot in self._plots.items()}
            sends.update({win: self._panes[win] for win in self._changed})
            self._changed = {}
        refusals = []
        for _, send in sorted(sends.items(), key=lambda item: self._plan.get(item[0], len(self._plan))):
            if send is None:
                continue
            try:
                send(self._viewer)
            except Refused as error:  # perhaps of this one alone: the others still get their turn
                refusals.append(error)
            except (OSError, WindowGone):
                raise
            except Exception as error:  # one item that cannot be sent must not keep back the others
                self._complain(error)
        if refusals:
            raise refusals[0]

    def _forget(self):
        """Mark everything as not sent: it is sent again in full, as a replacement."""
        with self._lock:
            for plot in self._plots.values():
                plot.whole = True
            self._changed = dict.fromkeys(self._panes, True)

    def _report_down(self, error):
        what = f"no visdom server answers at {self.address}"
        if isinstance(error, Refused):
            what = f"the server at {self.address} does not accept the dashboard ({error})"
        if not self._down:
            self._say(f"{what}; start one with `make dashboard`, or pass --no_visdom")
        self._down = True

    def _report_up(self):
        if self._down:
            self._say(f"the visdom server at {self.address} answers: the dashboard is complete")
        self._down, self._delay = False, self._backoff[0]

    def _complain(self, error):
        if not self._complained:
            self._say(f"the dashboard could not show something ({_describe(error)}); training continues")
        self._complained = True

    def _say(self, text):
        with contextlib.suppress(Exception):  # the caller's function, in our thread
            self._warn(text)


def _whole(message):
    return lambda viewer: viewer.whole(message)


def _numbers(row):
    """{name: finite number} of a row of an earlier run, {} where it has no step."""
    numbers = {k: v for k, v in row.items() if type(v) in (int, float) and math.isfinite(v)}
    return numbers if numbers.pop("step", None) is not None else {}


def _describe(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
