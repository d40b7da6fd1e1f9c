"""Shows progress. On a terminal, the display is a bar with the remaining time; otherwise, lines of text are printed."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from utils.core.errors import discard_output, printable
from utils.core.job import is_main

PLAIN_INTERVAL = 15.0  # seconds between the first lines if there is no terminal
CALM = 300.0  # seconds; after this time the interval between lines grows up to RAREST times, so that logs stay short
RAREST = 20
BAR = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"


output_is_closed = False  # True if a line could not be printed because no program reads stdout any more


def say(message: object) -> None:
    """Print a line without breaking a progress bar. File names may contain control characters, and characters that the
    terminal's encoding lacks; these are escaped. Only the main process prints. If no program reads stdout any more (`|
    head`), this line and later lines are lost. Work is not lost: a training run writes a checkpoint and stops, and a
    script that writes files completes the files."""
    global output_is_closed
    if not is_main():
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        tqdm.write(printable(message).encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        output_is_closed = True


class Progress:
    """A count towards a total. `update(n, **shown)`; use as a context manager.

    lazy: show nothing before the first skip_to or update, because there may be nothing to do. workers: the number of
    processes that work at the same speed. This number is used to estimate the unfinished work of all processes. Only
    the main process shows its count, so the count must include the work of all processes.
    """

    def __init__(
        self, total: int, description: str, unit: str = "it", initial: int = 0, lazy: bool = False, workers: int = 1
    ):
        self.workers, self.total, self.description, self.unit = workers, total, description, unit
        self.done, self.initial = initial, initial
        self.start = self.last_line = time.monotonic()
        self.plain = is_main() and not sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.last_shown: dict | None = None
        self.begun = 0.0  # the done part of unfinished units
        self.wants_bar = is_main() and not self.plain
        if not lazy:
            self._show_bar()

    def _show_bar(self) -> None:
        if self.wants_bar and self.bar is None:
            pace = "" if self.unit == "step" else ", {rate_fmt}"  # training adds images per second to the postfix
            self.bar = tqdm(
                total=self.total,
                desc=self.description,
                unit=self.unit,
                initial=self.initial,
                bar_format=BAR + pace + "{postfix}",
                dynamic_ncols=True,
                smoothing=0.05,
                mininterval=0.2,
                miniters=0,
            )

    def update(self, n: int = 1, shown: dict | None = None) -> None:
        """Advance by n; shown: {name: value} to show next to the count."""
        self.done += n
        self.begun = max(0.0, self.begun - n)
        self._show(shown)

    def has_begun(self, share: float) -> None:
        """Count a share of units that are started but not finished."""
        self.begun += share * self.workers
        self._show(None)

    def within(self, n: int) -> Callable:
        """Return a function f for work on the next n units: `for step in f(steps)` iterates over a list of steps and
        shows the number of completed steps."""

        def steps(items: list) -> Iterator:
            for i, item in enumerate(items):
                self.begun = n * self.workers * i / len(items)
                self._show(dict(step=f"{i + 1}/{len(items)}"))
                yield item

        return steps

    def _show(self, shown: dict | None) -> None:
        self._show_bar()
        if self.bar is not None:
            if shown:
                self.bar.set_postfix_str(_shown_text(shown), refresh=False)
            self.bar.update(max(0, self.count() - self.bar.n))
        elif self.plain:
            self.last_shown = shown or self.last_shown
            now = time.monotonic()
            interval = PLAIN_INTERVAL * min(max(1.0, (now - self.start) / CALM), RAREST)
            if now - self.last_line >= interval and self.done < self.total:
                self.last_line = now
                say(self.line())

    def count(self) -> int:
        """Return the number of completed units, including the finished part of the current work."""
        return min(int(self.done + self.begun), max(self.total, self.done))

    def skip_to(self, done: int) -> None:
        """Count work that an earlier run has completed and this run does not repeat."""
        if done > self.done:
            self.initial += done - self.done
            self.done = done
        self._show_bar()
        if self.bar is not None:
            self.bar.initial, self.bar.n = self.initial, self.done

    def rate(self) -> float:
        """Return the units per second since the start."""
        return (self.done + self.begun - self.initial) / max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        shown, pace = _shown_text(self.last_shown or {}), ""
        if rate := self.rate():  # with a rate of 0 the remaining time is unknown
            left = tqdm.format_interval((self.total - self.done - self.begun) / rate)
            pace = f", {rate:.2f} {self.unit}/s, {left} left"
        share = f"{100 * self.count() / max(self.total, 1):.0f}%"
        return f"{self.description}: {self.count()}/{self.total} ({share}){pace} {shown}".rstrip()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.plain and kind is None and time.monotonic() - self.start > PLAIN_INTERVAL:
            say(self.line())


class Forecast:
    """Estimates once how long a run will take. total: the last step of the run. left: the estimate in seconds."""

    STEPS, SECONDS = 20, 30.0  # the measurement ends after STEPS steps or SECONDS seconds
    SHORT = 10.0  # seconds; an estimate below this time is not reported
    LONG = 3650 * 86400.0  # seconds; an estimate above this time is reported without a date

    def __init__(self, total: int):
        self.total, self.told, self.left = total, False, 0.0
        self.first: tuple[int, float] | None = None

    def text(self, step: int) -> str | None:
        """Call this method after each step. Returns the estimate as one line when it is known, and None at all other
        steps."""
        now = time.monotonic()
        if self.told or self.first is None:
            self.first = self.first or (step, now)  # the first step is slow, and is not counted
            return None
        steps, seconds = step - self.first[0], now - self.first[1]
        if steps < self.STEPS and seconds < self.SECONDS:
            return None
        self.told = True
        left = self.left = (self.total - step) * seconds / steps
        if left < self.SHORT:
            return None
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left)) if left < self.LONG else "in decades"
        return f"{duration(seconds / steps)} per step: {duration(left)} to step {self.total} ({end})"


def duration(seconds: float) -> str:
    """Return a duration in seconds as text, such as 0.21 s, 45 s, 12 min, 3.5 h or 4.1 days."""
    for size, unit, most in ((1, "s", 90), (60, "min", 90), (3600, "h", 48)):
        if seconds < most * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.3g} days" if seconds < 1000 * 86400 else f"{seconds / 86400:.0f} days"


def _shown_text(shown: dict) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def track(items: Iterable, description: str, total: int | None = None, unit: str = "it", each: int = 1) -> Iterator:
    """Iterate over items with a progress bar. total: the number of items (default: len(items)). each: the number of
    units that one item counts for."""
    total = len(items) if total is None else total  # type: ignore[arg-type]
    with Progress(total * each, description, unit) as progress:
        for item in items:
            yield item
            progress.update(each)
