"""What an experiment found: a table on the terminal, a line of metrics.jsonl, pictures, the dashboard."""

import json
import math
import os
import time
from pathlib import Path

import torch

from utils.checkpoint import LOGS
from utils.dashboard import Dashboard
from utils.images import enlarge, save_png
from utils.progress import say


class Report:
    """The results of one command; a context manager.

    about: {name: models.load.Loaded} of the models that were measured.
    """

    def __init__(self, H, device, **about):
        self.H, self.device = H, device
        self.folder = Path(LOGS, H.log_dir)
        self.checkpoints = {name: dict(path=m.path, hash=m.hash) for name, m in about.items() if m is not None}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dashboard = Dashboard(H.visdom_server, H.visdom_port, H.log_dir, enabled=not H.no_visdom, warn=say)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.dashboard.close()

    def values(self, title, values, **about):
        """Print {name: number or text} as a table, and append it to logs/<log_dir>/metrics.jsonl with every
        argument, the checkpoints' hashes and `about` (JSON values)."""
        width = max(len(name) for name in values)
        lines = [title, *(f"  {name:<{width}}  {_shown(value)}" for name, value in values.items())]
        say("\n".join(lines))
        row = dict(
            metric=self.H.script, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            values={k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()},
            **about, checkpoints=self.checkpoints, args=self.H.to_dict(), device=_device_name(self.device),
            torch=torch.__version__,
        )  # fmt: skip
        self.append(row)
        self.dashboard.properties({"": title, **{name: _shown(value) for name, value in values.items()}})

    def append(self, row):
        """One line of metrics.jsonl, in one piece: several commands may write to the same file."""
        path = self.folder / "metrics.jsonl"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, (json.dumps(row) + "\n").encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def picture(self, name, picture, caption=None, min_side=256):
        """Save uint8 (C, h, w) as logs/<log_dir>/images/<name>.png and show it. Returns the path."""
        path = self.folder / "images" / f"{name}.png"
        picture = enlarge(picture.cpu(), min_side)
        save_png(path, picture)
        self.dashboard.image(name, picture.expand(3, -1, -1).numpy(), caption or name)
        return path


def _shown(value):
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
