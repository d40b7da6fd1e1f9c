"""Writes the files of a training run that grow line by line."""

import itertools
import json
import os
import time
from typing import Any

from utils.core.files import Lines, remove_temporaries
from utils.core.progress import say


class RunLogs:
    """Writes log.txt (messages), stats.jsonl (curves) and speed.jsonl in a run's folder. Only the main process has a
    RunLogs."""

    def __init__(self, folder: str, manifest: dict[str, Any] | None) -> None:
        """manifest: the manifest of the checkpoint that the run continues from, or None."""
        for place in (folder, os.path.join(folder, "images")):
            remove_temporaries(place)
        self.log = Lines(os.path.join(folder, "log.txt"))
        self.stats = _open_stats(os.path.join(folder, "stats.jsonl"), manifest)
        self.speed = Lines(os.path.join(folder, "speed.jsonl"))

    def write_message(self, message: str) -> None:
        self.log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def write_curves(self, step: int, values: dict[str, Any]) -> None:
        self.stats.append(json.dumps(dict(step=step, **values)))

    def write_speed(self, step: int, values: dict[str, Any]) -> None:
        self.speed.append(json.dumps(dict(step=step, **values)))

    def close(self) -> None:
        for file in (self.log, self.stats, self.speed):
            file.close()


def _open_stats(path: str, manifest: dict[str, Any] | None) -> Lines:
    """Open stats.jsonl. The file is truncated to its size at the checkpoint, because the run writes the later lines
    again. Without a checkpoint, an existing file is renamed."""
    if manifest is None and os.path.isfile(path) and os.path.getsize(path):
        numbered = (f"{path.removesuffix('.jsonl')}_{i}.jsonl" for i in itertools.count(1))
        aside = next(name for name in numbered if not os.path.lexists(name))
        os.rename(path, aside)
        say(f"the curves of an earlier start are kept in {aside}")
    known = manifest or {}
    stats = Lines(path, keep=known.get("stats_bytes", 0))
    if stats.size < known.get("stats_bytes", 0) or known.get("stats_sha256", stats.sha256) != stats.sha256:
        step = known.get("step", 0)
        say(f"warning: {path} is not what was written; the curves before step {step} are incomplete or wrong")
    return stats
