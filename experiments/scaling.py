"""Measures how the throughput of training and sampling grows with the number of processes. Run it with torchrun."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hparams.config import opt
from hparams.environment import COMMON, require_packages
from hparams.own import parse_own
from hparams.sources import run_folder


@dataclass
class ScalingConfig:
    """scaling"""

    size: str = opt(
        "auto",
        "model size: paper (256 x 256 pixels, 24 layers) or small; auto: paper on CUDA",
        choices=["auto", "paper", "small"],
    )
    seconds: float = opt(10.0, "time for each figure; at least three rounds", above=0.0)
    device: str = opt("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    threads: int = opt(None, "threads of each process on a CPU (default: torchrun's choice, 1)", min=1, max=1024)
    log_dir: str = opt("scaling", "folder under logs/ for scaling.json", metavar="NAME")


EPILOG = """Each job is measured three times. First, the main process runs alone, and all other processes wait. Second,
all processes run, each with a batch of its own (weak scaling). Third, one batch is divided among all processes (strong
scaling, if the job has a batch). The efficiency of N processes is their throughput, divided by N times the throughput
of one process.

example:
  torchrun --nproc_per_node 4 experiments/scaling.py --seconds 30
"""


if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    what = "Compare the throughput of several processes with that of one."
    CONFIG = parse_own(ScalingConfig, what, EPILOG, check=lambda config: run_folder(config.log_dir))
    require_packages(*COMMON)

import contextlib
import os
import statistics
import warnings

import torch

from experiments.common.jobs import Bench, timed
from models.build import build_vqgan
from utils.core import distributed
from utils.core.checkpoint import LOGS
from utils.core.errors import UserError, run_main
from utils.core.files import write_json
from utils.core.progress import say

LEAST_ROUNDS = 3


@contextlib.contextmanager
def as_one_process():
    """A context in which this process acts like the only process of its job."""
    before = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    os.environ.update(RANK="0", WORLD_SIZE="1")
    try:
        yield
    finally:
        os.environ.update(before)


def seconds_of(function, config, device):
    """Return the median time of a call, in seconds. The calls together take about --seconds. All processes make the
    same number of calls."""
    timed(function, device)  # the first call warms up
    wanted = config.seconds / timed(function, device)
    rounds = distributed.from_main(lambda: max(LEAST_ROUNDS, int(wanted)))
    return statistics.median(timed(function, device) for _ in range(rounds))


def alone(function, config, device):
    """Return seconds_of in the main process, while all other processes wait."""

    def measure_one():
        with as_one_process():
            return seconds_of(function, config, device)

    return distributed.from_main(measure_one)


def measure(make, batch, config, bench):
    """Measure a row of the table. make(flags) returns the jobs.Job of one process. Unless batch is None, the flags
    contain --batch_size with the batch of this process."""
    world = distributed.world_size()

    def rate(share, seconds, processes):
        with as_one_process():
            job = make("" if batch is None else f"--batch_size {share}")
        return job.name, job.unit, job.items * processes / seconds(job.fast, config, bench.device)

    name, unit, one = rate(batch, alone, 1)
    row = dict(job=name, unit=unit, batch=batch, one=one, weak=rate(batch, seconds_of, world)[2])
    if batch is not None and batch % world == 0:
        row["strong"] = rate(batch // world, seconds_of, world)[2]
    return row


def gradients(bench, config):
    """Yield a row for each stage, with the time of averaging the gradients in a step, and with the number of parameters
    that have these gradients."""
    with as_one_process():
        vqgan, sampler = build_vqgan(bench.vqgan_H()), bench.sampler(bench.sampler_H())
    for stage, modules in (("VQGAN step", (vqgan.ae, vqgan.disc)), ("sampler step", (sampler,))):
        count = sum(p.numel() for module in modules for p in module.parameters())
        message = torch.zeros(count, device=bench.device, requires_grad=True)
        message.grad = torch.zeros_like(message)
        seconds = seconds_of(lambda m=message: distributed.average_gradients([m]), config, bench.device)
        yield dict(stage=stage, parameters=count, seconds=seconds)


def line_of(row, world):
    """Write a row as a line of a Markdown table."""
    cells = [f"{row['one']:.3g} {row['unit']}/s"]
    for kind in ("weak", "strong"):
        rate = row.get(kind)
        cells += [f"{rate:.3g} {row['unit']}/s", f"{100 * rate / row['one'] / world:.0f}%"] if rate else ["", ""]
    return f"| {row['job']} | {' | '.join(cells)} |"


def main(config):
    """Measure all jobs. config: ScalingConfig, or another object with the same attributes."""
    world = distributed.world_size()
    if world == 1:
        raise UserError("scaling needs several processes: torchrun --nproc_per_node N experiments/scaling.py")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
    bench = Bench(config.device, config.size)
    about = dict(bench.about(), processes=world)
    say(f"{world} processes, each on {about['device']}; {about['size']} models in {about['precision']}")
    say(f"| job | one process | {world}, each its batch | efficiency | {world}, its batch divided | efficiency |")
    say("|---|---|---|---|---|---|")
    rows = []
    least = 2 if bench.size_name == "small" else 8  # the least number of images of a process
    for make, batch in [
        (lambda flags: bench.vqgan_step(f"--disc_start_step 0 {flags}"), least * world),
        (bench.sampler_step, 4 * least * world),
        (lambda _: bench.sampling(), None),
    ]:
        rows.append(measure(make, batch, config, bench))
        say(line_of(rows[-1], world))
    sent = list(gradients(bench, config))
    for row in sent:
        size = 4 * row["parameters"] / 2**20
        say(f"{row['stage']}: {size:,.0f} MiB of gradients, averaged in {row['seconds']:.3g} s")
    if distributed.is_main():
        write_json(LOGS / config.log_dir / "scaling.json", dict(about, jobs=rows, gradients=sent))
    distributed.cleanup()


if __name__ == "__main__":
    run_main(main, CONFIG)
