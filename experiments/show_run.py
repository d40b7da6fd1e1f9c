"""Shows a run again, from the files of the run. The script fills the dashboard and writes logs/<log_dir>/report.html.

The script needs no torch and no model. The run may be finished, still running, or copied from another machine.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hparams.config import opt
from hparams.environment import require_packages
from hparams.own import parse_own
from hparams.sources import require_folder
from utils.core.address import server_address
from utils.core.errors import printable, quit_quietly_at_interrupt, run_main


@dataclass
class ShowConfig:
    """what to show, and where"""

    log_dir: str = opt(None, "the run's folder under logs/", required=True, metavar="NAME")
    visdom_port: int = opt(8097, "port of the visdom server", min=1, max=65535)
    visdom_server: str = opt(None, "address of the visdom server (default: this machine)", metavar="URL")
    no_visdom: bool = opt(False, "write only the report")


EXAMPLES = """examples:
  python experiments/show_run.py --log_dir vqgan_churches
  python experiments/show_run.py --log_dir FID_log --no_visdom

The report is one file that includes its pictures. You can send or print the report, and open it without a network.
"""


def _check(config):
    require_folder("log_dir", config.log_dir)
    server_address(config.visdom_server, config.visdom_port)


def parse(argv=None):
    """Parse the command line -> ShowConfig."""
    return parse_own(ShowConfig, "Show a run again: dashboard and report.", EXAMPLES, argv, _check)


if __name__ == "__main__":
    CONFIG = parse()
    require_packages("numpy", "PIL", "tqdm", "matplotlib", "jinja2")
    quit_quietly_at_interrupt()

import numpy as np

from utils.core.checkpoint import LOGS
from utils.core.progress import say
from utils.display.live_dashboard import Dashboard
from utils.display.report import write_report
from utils.display.saved_run import SavedRun, reduced

PATIENCE = 60.0  # the number of seconds that sending all data of a long run to the server may take


def show_on_dashboard(run, config):
    """Send all data to the run's environment. The dashboard prints one line about the result."""
    plots = [f"curves-{name}" for name in run.traces() if name != "loss"]
    batch, total, step = run.hparams.get("batch_size"), run.hparams.get("train_steps"), run.last_step()
    board = Dashboard(
        config.visdom_server,
        config.visdom_port,
        config.log_dir,
        say=say,
        plan=["progress", "curves-loss", "properties", *plots] if plots else ["results", "properties"],
        images_per_step=batch if type(batch) is int and batch > 0 else None,
    )
    if run.rows:
        total = total if type(total) is int and total > 0 else step
        board.progress(step, total, {}, "finished" if step >= total else "stopped, or under way")
    board.history(run.curves)
    for name, bar in run.bars.items():
        values = [float("nan") if v is None else v for v in bar["values"]]
        board.bars(name, values, bar.get("x"), str(bar.get("xlabel", "")), str(bar.get("ylabel", "")))
    for picture in run.pictures():
        image = run.open(picture)
        if image is not None:
            pixels = np.asarray(reduced(image)).transpose(2, 0, 1)
            board.image(printable(picture.name), pixels, printable(picture.caption))
    board.properties(run.arguments())
    if run.metrics:
        board.properties(run.metrics[-1]["values"], "results")
    board.close(PATIENCE)


def main(config):
    run = SavedRun(LOGS / config.log_dir)
    run.draw_strips()
    if not config.no_visdom:
        show_on_dashboard(run, config)
    say(f"report: {write_report(run)}")


if __name__ == "__main__":
    run_main(main, CONFIG)
