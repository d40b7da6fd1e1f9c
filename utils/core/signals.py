"""Handles SIGTERM, SIGINT and SIGUSR1. The first signal asks a run to stop after its step; a second signal ends the run
at once."""

import contextlib
import os
import signal
import time
from typing import Any

from utils.core import job

# PASSING_ON is in seconds. A launcher may forward a signal that all processes already received. Therefore two signals
# within this time count as one.
PASSING_ON = 3.0


class StopRequest:
    """A context manager that records a signal. `number` is the number of the received signal, or 0 before a signal."""

    SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for name in self.SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # A handler that was not set from Python is None, and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.number:
            if job.world_size() > 1 and now - self._since < PASSING_ON:
                return
            os._exit(128 + number)
        self.number, self._since = number, now
        with contextlib.suppress(OSError):  # a closed terminal must not make the step fail
            if job.is_main():
                os.write(2, b"\nstopping after this step; a second signal ends the run at once\n")

    @property
    def exit_code(self) -> int:
        return 128 + self.number
