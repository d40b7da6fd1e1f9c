"""Shows curves, bars, images and hyperparameters of a run on a live visdom dashboard.

The public methods only store data and return at once. A daemon thread sends the data, so that a slow, hanging or absent
server never delays a training step. All data are kept in memory, in limited size. All data are sent again if a server
starts, restarts, or has lost data.
"""

import contextlib
import hashlib
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.address import server_address
from utils.display.curves import NEVER_SMOOTHED, Curve
from utils.display.dashboard_panes import NOTHING_YET, Plot, bar_pane, progress_pane, text_pane
from utils.display.run_files import is_number
from utils.display.visdom_client import Refused, WindowGone, client_class

COMPARED_POINTS = 1000  # the most points of each curve of another run
PANE_SIZE = (256, 640)  # the smallest and the largest longer side of an image's pane, in pixels
SEPARATORS = {"_": "-", "-": "--", "/": "---"}
ORDINARY = re.compile(r"[^\W_](?:[^\W_]|[._/-](?=[^\W_]))*")
LONGEST = 100  # the most characters of a name


def env_name(log_dir: str | Path) -> str:
    """The name of the visdom environment of a run that logs to `log_dir` (a path or any text). Different texts give
    different names.

    visdom replaces '/' by '_', lists 'a_b' under an environment 'a' even if 'a' does not exist, and reads 'a+b' as two
    names. Names are also part of URLs and file names. Therefore names consist of letters, digits, '.' and '-'. The
    number of hyphens encodes which of SEPARATORS was replaced. If the text has other special characters, the name ends
    with four hyphens and a hash.
    """
    text = Path(log_dir).as_posix()
    name = re.sub(r"[_/-]", lambda match: SEPARATORS[match[0]], text)
    if ORDINARY.fullmatch(text) and len(name) <= LONGEST:
        return name
    name = re.sub(r"(?:[^\w.-]|_)+", "-", text).strip("-.")[-LONGEST:].lstrip("-.") or "run"
    return f"{name}----{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class Dashboard:
    """Shows a run in one visdom environment. All methods return at once, except close(). Any thread may call the
    methods.

    server: None (localhost), a host name or a URL. Any other value raises UsageError. port: int.
    env: any text, such as the log folder. env_name() makes a valid name of this text, which is the attribute `env`.
    plan: names of panes (utils/display/dashboard_panes.py) that are on the page from the start, in this order.
    notes: {pane of curves: text that is shown until the pane has a point}. The default text is "nothing yet".
    images_per_step: if given, the curves also show the number of images seen.
    enabled: with False, every method does nothing. say: a function that the thread calls with one line of text, such as
    the address of the page or an error.
    interval: seconds between sends. backoff: shortest and longest wait after a failure in seconds.
    timeouts: seconds for (connecting, an answer). max_points: bound on the points of a curve, at least 2.
    The environment variables VISDOM_USERNAME and VISDOM_PASSWORD are used as a login if both are set. The attribute
    `url` is the address of the page, or None if the dashboard is not enabled.
    """

    def __init__(
        self,
        server: str | None,
        port: int,
        env: str | Path,
        enabled: bool = True,
        say: Callable[[str], object] = print,
        *,
        plan: Sequence[str] = (),
        notes: Mapping[str, str] | None = None,
        images_per_step: int | None = None,
        interval: float = 2.0,
        backoff: tuple[float, float] = (2.0, 30.0),
        timeouts: tuple[float, float] = (3.0, 10.0),
        max_points: int = 5000,
    ) -> None:
        self.enabled, self.name, self.env = enabled, str(env), env_name(env)
        self.url: str | None = None
        self._plots: dict[str, Plot] = {}
        self._panes: dict[str, dict[str, Any]] = {}  # the latest message of each pane without curves
        self._changed: set[str] = set()  # the names of panes that are not sent yet
        self._others: dict[str, dict[str, dict[str, Curve]]] = {}  # {run: {window: {trace: Curve}}}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        if not enabled:
            return
        origin, port, path = server_address(server, port)
        self.address = f"{origin}:{port}{path}"
        self.url = f"{self.address}/env/{self.env}"
        self._options: dict[str, Any] = dict(
            server=origin, port=port, base_url=path or "/", env=self.env, timeouts=timeouts
        )
        self._up: bool | None = None  # whether the server answered the last request; None before the first request
        login = {k: os.environ.get(f"VISDOM_{k.upper()}") for k in ("username", "password")}
        if all(login.values()):
            self._options.update(login)
        self._print_line, self._interval, self._backoff = say, interval, backoff
        self._max_points, self._images_per_step = max_points, images_per_step
        self._plan = {win: rank for rank, win in enumerate(plan)}
        self._notes = {win: (notes or {}).get(win, NOTHING_YET) for win in plan}
        self._client: Any = None
        self._delay, self._complained = backoff[0], False
        for win in plan:
            self._put_placeholder(win)
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the point (step, value) to the curve of each name in `values`, a dict {name: number}.

        Names 'window/trace' put several traces into one window with a legend; any other name has its own window. Values
        that are None or not finite are left out. If the step is not larger than the curve's last step, the curve is
        replaced from this step on. Raises TypeError for values that are not numbers.
        """
        if not self.enabled:
            return
        step = int(step)
        points = [(k, float(v)) for k, v in values.items() if v is not None and math.isfinite(v)]
        with self._lock:
            for name, value in points:
                window, _, trace = name.partition("/")
                self._plot(window).add(trace or window, step, value)

    def history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the points of an earlier run. rows: dicts with 'step' and names as in scalars().

        Values that are not numbers and rows without 'step' are skipped. Call this method before scalars().
        """
        for step, numbers in _numbers(rows):
            self.scalars(step, numbers)

    def compare(self, run: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Show the curves of another run in the plots of this run. run: the name of the other run. rows: its points, in
        the form of history().

        Curves without a plot in this run are left out. Call this method before the first values of this run are sent.
        """
        if not self.enabled:
            return
        windows = self._others.setdefault(run, {})
        for step, numbers in _numbers(rows):
            for name, value in numbers.items():
                window, _, trace = name.partition("/")
                curve = Curve(COMPARED_POINTS, window not in NEVER_SMOOTHED)
                windows.setdefault(window, {}).setdefault(trace or window, curve).add(step, float(value))
        with self._lock:
            for plot in self._plots.values():
                plot.compare(self._others_in(plot.name))

    def _others_in(self, window: str) -> dict[str, dict[str, Curve]]:
        """Return the curves of all other runs in a window, as {run: {trace: Curve}}."""
        return {run: windows.get(window, {}) for run, windows in self._others.items()}

    def bars(self, name: str, values: Any, x: Any = None, xlabel: str = "", ylabel: str = "") -> None:
        """Show bars of heights `values` (n,) over `x` (n,), which are numbers or strings. The default of x is 0 ...
        n-1.

        Only the latest bars of a name are kept. Values that are not finite have no bar. Raises ValueError for other
        shapes.
        """
        if not self.enabled:
            return
        values = np.asarray(values, dtype=np.float64)
        x = np.arange(values.size) if x is None else np.asarray(x)
        if values.ndim != 1 or x.shape != values.shape:
            raise ValueError(f"bars {name!r}: shapes {values.shape} and {x.shape} instead of two of (n,)")
        shown = np.isfinite(values)
        self._put(bar_pane(f"bars-{name}", x[shown].tolist(), values[shown].tolist(), xlabel, ylabel))

    def image(self, name: str, array: Any, caption: str | None = None) -> None:
        """Show an RGB image, uint8 (3, H, W). Only the latest image of a name is kept.

        Raises ValueError for other shapes and types.
        """
        if not self.enabled:
            return
        array = np.array(array)  # a copy, because the caller may reuse its buffer
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] != 3 or not array.size:
            raise ValueError(f"image {name!r}: {array.dtype} {array.shape} instead of uint8 (3, H, W)")
        scale = np.clip(max(array.shape), *PANE_SIZE) / max(array.shape)
        height, width = (math.ceil(n * scale) for n in array.shape[1:])
        # The caption is the title of the pane. visdom's own caption would appear twice, over the edges of the picture.
        opts = dict(width=width, height=height, title=caption or name)
        self._put(dict(win=f"image-{name}", img=array, opts=opts))

    def properties(self, values: Mapping[str, Any], name: str = "properties") -> None:
        """Show a dict as a table of two columns. The contents are shown as text, not as HTML."""
        if self.enabled:
            self._put(text_pane(name, "table.html", values=values))

    def progress(self, step: int, total: int, values: Mapping[str, Any], state: str = "running") -> None:
        """Show the progress of a run. values: {name: value} to show below the bar. state: text that begins with one of
        utils.display.dashboard_panes.STATES."""
        if self.enabled:
            self._put(progress_pane(self.name, step, total, state, values))

    def close(self, timeout: float = 5.0) -> None:
        """Send the remaining data and stop, after at most `timeout` seconds. Never raises."""
        self.enabled = False
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        thread.join(timeout)
        if thread.is_alive():
            self._print_line = lambda text: None  # printing while the interpreter shuts down can crash it

    def _plot(self, window: str) -> Plot:
        """Return the plot of this name. The plot is created if it does not exist."""
        if window not in self._plots:
            note = self._notes.get(f"curves-{window}", "")
            self._plots[window] = plot = Plot(window, self._max_points, self._images_per_step, self.name, note)
            plot.compare(self._others_in(window))
        return self._plots[window]

    def _put_placeholder(self, win: str) -> None:
        kind, _, name = win.partition("-")
        if kind == "curves":
            self._plot(name)
        elif kind == "bars":
            self._put(bar_pane(win, [], []))
        else:
            self._put(text_pane(win, "table.html", values={}))

    def _put(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._panes[message["win"]] = message
            self._changed.add(message["win"])

    # Only the thread calls the following methods.

    def _run(self) -> None:
        try:  # the import is here and not at the top, because it takes seconds
            self._client_class = client_class()
        except Exception as error:  # a broken installation can raise any exception; training continues
            self.enabled = False
            self._say(f"visdom cannot be imported ({_describe(error)}): no dashboard")
            return
        wait = 0.0
        while not self._closing.wait(wait):
            wait = self._send_or_report(final=False)
        self._send_or_report(final=True)

    def _send_or_report(self, final: bool) -> float:
        """Send new data. Reports a failure, but never raises. Returns the seconds until the next attempt."""
        try:
            self._send(final)
        except (OSError, Refused) as error:
            self._client = None  # the next attempt logs in again
            self._forget()
            self._report_down(error)
            wait, self._delay = self._delay, min(2 * self._delay, self._backoff[1])
            return wait
        except Exception as error:  # an error in the dashboard must not end the dashboard or training
            self._complain(error)
        else:
            self._report_up()
        return self._interval

    def _send(self, final: bool) -> None:
        if self._client is None:
            self._client = self._client_class(**self._options)
        # Ask every time, even with nothing to send, to notice that the server was restarted.
        if self.env not in self._client.environments():
            self._forget()
        try:
            self._send_news(final)
        except WindowGone:
            self._forget()
            self._send_news(final)

    def _send_news(self, final: bool) -> None:
        with self._lock:
            news = {f"curves-{name}": plot.take(final) for name, plot in self._plots.items()}
            news.update({win: self._panes[win] for win in self._panes if win in self._changed})
            self._changed.clear()
        refused: Refused | None = None
        for win in sorted(news, key=lambda win: self._plan.get(win, len(self._plan))):
            try:
                if news[win] is not None:
                    self._client.show(news[win])
            except Refused as error:  # try the other panes, because the server may refuse only this pane
                refused = refused or error
            except (OSError, WindowGone):
                raise
            except Exception as error:  # a pane that cannot be sent must not stop the other panes
                self._complain(error)
        if refused:
            raise refused

    def _forget(self) -> None:
        """Mark all data as not sent. The next attempt then sends all data again."""
        with self._lock:
            for plot in self._plots.values():
                plot.whole = True
            self._changed.update(self._panes)

    def _report_down(self, error: Exception) -> None:
        what = f"no visdom server answers at {self.address}"
        if isinstance(error, Refused):
            what = f"the server at {self.address} does not accept the dashboard ({error})"
        if self._up is not False:
            self._say(f"{what}; start one with `make dashboard`, or pass --no_visdom")
        self._up = False

    def _report_up(self) -> None:
        if not self._up:
            self._say(f"dashboard: {self.url}" + (" (a server answers now)" if self._up is False else ""))
        self._up, self._delay = True, self._backoff[0]

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._say(f"the dashboard could not show something ({_describe(error)}); training continues")
        self._complained = True

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):  # the function comes from the caller and may raise any exception
            self._print_line(text)


def _numbers(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, {name: number}) for each row of an earlier run that has a step."""
    for row in rows:
        numbers = {name: value for name, value in row.items() if is_number(value)}
        if "step" in numbers:
            yield int(numbers.pop("step")), numbers


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
