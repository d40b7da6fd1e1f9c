"""SIGTERM, SIGINT, SIGUSR1: the first asks a run to stop after its step, the second ends it at once."""

import contextlib
import os
import signal
import time
from typing import Any

from utils.core import job

# Seconds. A launcher may forward a signal that all processes already received. Two signals within this time count as
# one.
PASSING_ON = 3.0


class StopRequest:
    """Context manager. `number` is the signal that was received, or 0 if there was none."""

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
            # None: a handler that was not set from Python, and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.number:
            if job.world_size() > 1 and now - self._since < PASSING_ON:
                return
            os._exit(128 + number)
        self.number, self._since = number, now
        with contextlib.suppress(OSError):  # the terminal may be gone; this must not make the step fail
            if job.is_main():
                os.write(2, b"\nstopping after this step; once more ends the run at once\n")

    @property
    def exit_code(self) -> int:
        return 128 + self.number
