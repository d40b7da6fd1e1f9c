"""Progress on the terminal: a bar with ETA; plain lines where there is no terminal."""

import sys
import time

from tqdm import tqdm

from utils.errors import printable
from utils.job import is_main

PLAIN_INTERVAL = 15.0  # seconds between lines without a terminal


def say(message):
    """Print a line without breaking a bar; what the terminal's encoding lacks, and what would not be shown but
    obeyed, is escaped (file names!). Of several processes the main one speaks for all."""
    if not is_main():
        return
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(printable(message).encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """A count towards a total. `update(n, **shown)`; use as a context manager.

    lazy: nothing is shown before the first skip_to or update: perhaps there is nothing to do. Of several processes
    the main one shows its own, which must count for all.
    """

    def __init__(self, total, description, unit="it", initial=0, enabled=True, lazy=False):
        self.total, self.description, self.unit = total, description, unit
        self.done, self.initial = initial, initial
        self.start = self.last_line = time.monotonic()
        self.plain = enabled and is_main() and not sys.stderr.isatty()
        self.bar = self.last_shown = None
        self.begun = 0.0  # units of work that is under way
        self.wants_bar = enabled and is_main() and not self.plain
        if not lazy:
            self._show_bar()

    def _show_bar(self):
        if self.wants_bar and self.bar is None:
            self.bar = tqdm(total=self.total, desc=self.description, unit=self.unit, initial=self.initial,
                            dynamic_ncols=True, smoothing=0.05, mininterval=0.2, miniters=0)  # fmt: skip

    def update(self, n=1, shown=None):
        """Advance by n; shown: {name: value} to stand beside the count."""
        self.done += n
        self.begun = 0.0
        self._show(shown)

    def within(self, n):
        """A function that iterates over a list, the steps of work on the next n, and shows what is done of it."""

        def steps(items):
            for i, item in enumerate(items):
                self.begun = n * i / len(items)
                self._show(dict(step=f"{i + 1}/{len(items)}"))
                yield item

        return steps

    def _show(self, shown):
        self._show_bar()
        if self.bar is not None:
            if shown:
                self.bar.set_postfix_str(_shown_text(shown), refresh=False)
            self.bar.update(max(0, int(self.done + self.begun) - self.bar.n))
        elif self.plain:
            self.last_shown = shown or self.last_shown
            if time.monotonic() - self.last_line >= PLAIN_INTERVAL and self.done < self.total:
                self.last_line = time.monotonic()
                say(self.line())

    def skip_to(self, done):
        """Count what was done before this run, and need not be done again."""
        if done > self.done:
            self.initial += done - self.done
            self.done = done
        self._show_bar()
        if self.bar is not None:
            self.bar.initial, self.bar.n = self.initial, self.done

    def rate(self):
        """Units a second since the start."""
        return (self.done + self.begun - self.initial) / max(time.monotonic() - self.start, 1e-9)

    def line(self):
        shown, pace = _shown_text(self.last_shown or {}), ""
        if rate := self.rate():  # else nobody knows
            left = tqdm.format_interval((self.total - self.done - self.begun) / rate)
            pace = f", {rate:.2f} {self.unit}/s, {left} left"
        share = f"{100 * self.done / max(self.total, 1):.0f}%"
        return f"{self.description}: {self.done}/{self.total} ({share}){pace} {shown}".rstrip()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.bar is not None:
            self.bar.close()
        elif self.plain and kind is None and time.monotonic() - self.start > PLAIN_INTERVAL:
            say(self.line())


def _shown_text(shown):
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def track(iterable, description, total=None, unit="it", each=1):
    """Iterate with a progress bar. each: what one of its items counts for."""
    total = len(iterable) if total is None else total
    with Progress(total * each, description, unit) as progress:
        for item in iterable:
            yield item
            progress.update(each)
