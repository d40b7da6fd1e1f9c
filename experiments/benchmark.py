"""Times each job of the program and its plain form. The two forms run in turn, and the medians are printed."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hparams.config import opt
from hparams.environment import COMMON, require_packages
from hparams.own import parse_own
from hparams.sources import run_folder

JOBS = (
    "vqgan_step vqgan_step_early sampler_step sampling sampling_1000 autoregressive likelihood neighbours "
    "larger_images prdc images"
).split()


@dataclass
class BenchmarkConfig:
    """benchmark"""

    jobs: list[str] = opt(JOBS, "what to time", choices=JOBS)
    size: str = opt(
        "auto",
        "model size: paper (256 x 256 pixels, 24 layers) or small; auto: paper on CUDA",
        choices=["auto", "paper", "small"],
    )
    costs: bool = opt(False, "measure only how time and memory grow with latents, batch, layers and steps")
    seconds: float = opt(20.0, "time for each job; each form runs at least twice", above=0.0)
    device: str = opt("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    compile: str = opt(
        "auto",
        "torch.compile in the fast forms of the steps and of sampling; auto: on CUDA",
        choices=["auto", "on", "off"],
    )
    float32: bool = opt(False, "use float32 in the fast forms")
    threads: int = opt(None, "threads of a CPU (default: PyTorch's choice)", min=1, max=1024)
    log_dir: str = opt("benchmark", "folder under logs/ for benchmark.json", metavar="NAME")


EPILOG = """The plain forms (tests/plain.py) follow the definitions directly. They use float32 and explicit attention
matrices. At every step they compute the network at all positions, and they compare one pair of images at a time. The
fast forms are the code of the scripts, with --amp if the device has bf16 (unless --float32). The peak is the speed of a
large matrix product in the same run and number format.

example:
  python experiments/benchmark.py --jobs sampling sampler_step --seconds 60
"""


if __name__ == "__main__":  # parse before the slow import of torch, so that --help and errors are fast
    what = "Compare the time of each job with that of its plain form."
    CONFIG = parse_own(BenchmarkConfig, what, EPILOG, check=lambda config: run_folder(config.log_dir))
    require_packages(*COMMON)

import statistics
import time
import warnings
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import scaling
from experiments.common.jobs import Bench, timed
from models.summary import count_flops
from utils.core import distributed
from utils.core.checkpoint import LOGS
from utils.core.errors import run_main
from utils.core.files import write_json
from utils.core.progress import say


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create. `live` is the present number, `most` the largest one."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)):
            key, size = id(storage), storage.nbytes()
            if key not in self.known and key not in before:  # the tensor is neither a view nor an in-place result
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self._forget, key, size)
        self.most = max(self.most, self.live)
        return out

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= size


def peak_memory(function, device):
    """Return the peak memory of function() in MiB, without the memory that was allocated before. On CUDA the result
    counts all memory, and on other devices only PyTorch's tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.compiler.set_stance("force_eager"), LiveTensors() as tensors:
        function()
    return tensors.most / 2**20


def peak_flops(device, dtype):
    """Measure the FLOP/s of a large matrix product. The best of several measurements is returned."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def flops_of(job):
    """Return the FLOPs of one call of fast(), or None."""
    if not job.flops:
        return None
    with torch.compiler.set_stance("force_eager"):
        return count_flops(job.fast)


def measure(job, bench, peak, seconds):
    """Run the two forms in turn for about `seconds`, and return a row of the table."""
    # The measurement of memory makes the first calls, which warm up.
    rows = {form: dict(mib=peak_memory(getattr(job, form), bench.device), times=[]) for form in ("fast", "plain")}
    flops = flops_of(job)
    job.fast()  # compiled jobs need a second call to warm up
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(rows["plain"]["times"]) < 2:
        for form in rows:
            rows[form]["times"].append(timed(getattr(job, form), bench.device))
    medians = {form: statistics.median(row["times"]) for form, row in rows.items()}
    ratios = [p / f for f, p in zip(rows["fast"]["times"], rows["plain"]["times"], strict=True)]
    return dict(
        job=job.name,
        unit=job.unit,
        ratio=statistics.median(ratios),
        rounds=len(ratios),
        **{f"{form}_per_second": job.items / medians[form] for form in rows},
        **{f"{form}_mib": rows[form]["mib"] for form in rows},
        gflops_per_item=flops and flops / job.items / 1e9,
        share_of_peak=flops and flops / medians["fast"] / peak,
    )


def growing(bench):
    """Yield the sizes to vary as (title, the job's method, [(value, the method's argument)])."""
    H = bench.sampler_H()
    side = H.img_size // H.latent_shape[1]  # the side of a code in pixels
    latents = [(f"{n} x {n}", f"--img_size {n * side}") for n in (8, 16, 32, 64)]
    yield "VQGAN step, latents", bench.vqgan_step, latents[:3]
    yield "VQGAN step, batch", bench.vqgan_step, [(n, f"--batch_size {n}") for n in (1, 2, 4, 8)]
    yield "sampler step, latents", bench.sampler_step, [(v, f"{f} --batch_size 2") for v, f in latents]
    yield "sampler step, batch", bench.sampler_step, [(n, f"--batch_size {n}") for n in (4, 8, 16, 32)]
    yield "sampler step, layers", bench.sampler_step, [(n, f"--bert_n_layers {n}") for n in (2, 4, 8, 16)]
    yield "sampling, steps", bench.sampling, [(n, n) for n in (16, 64, 256)]
    yield "sampling, latents", lambda more: bench.sampling(64, more), latents[:3]


def measure_costs(bench):
    """Measure the time, memory and FLOPs of jobs that grow in one size. Print a table and return its rows.

    The table shows time and FLOPs as multiples of the values at the smallest size.
    """
    say("| what grows | value | seconds | time | FLOPs | memory |\n|---|---|---|---|---|---|")
    rows = []
    for title, make, values in growing(bench):
        first = None
        for value, argument in values:
            job = make(argument)
            mib, flops = peak_memory(job.fast, bench.device), flops_of(job)
            seconds = statistics.median(timed(job.fast, bench.device) for _ in range(3))
            first = first or (seconds, flops)
            rows.append(dict(what=title, value=str(value), seconds=seconds, mib=mib, gflops=flops / 1e9))
            growth = f"x {seconds / first[0]:.2f} | x {flops / first[1]:.2f}"
            say(f"| {title} | {value} | {seconds:.3g} | {growth} | {in_mib(mib)} |")
    return rows


HEAD = "| job | fast | plain | ratio | share of peak | GFLOP each | memory, fast | memory, plain |"


def in_mib(value):
    return f"{value:.0f} MiB" if value >= 1 else ""  # memory of numpy arrays and lists of bytes is not counted


def line_of(row):
    """Write a row as a line of a Markdown table."""
    share = f"{100 * row['share_of_peak']:.0f}%" if row["share_of_peak"] else ""
    flops = f"{row['gflops_per_item']:.3g}" if row["gflops_per_item"] else ""
    fast, slow = (f"{row[f'{form}_per_second']:.3g} {row['unit']}/s" for form in ("fast", "plain"))
    memory = " | ".join(in_mib(row[f"{form}_mib"]) for form in ("fast", "plain"))
    return f"| {row['job']} | {fast} | {slow} | {row['ratio']:.2f} | {share} | {flops} | {memory} |"


def main(config):
    if distributed.world_size() > 1:
        return scaling.main(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
    bench = Bench(config.device, config.size, config.float32, config.compile)
    peak = peak_flops(bench.device, bench.precision.dtype)
    about = dict(bench.about(), peak_tflops=peak / 1e12)
    say(
        f"{about['device']}; {about['size']} models; fast forms in {about['precision']}, plain ones in float32; "
        f"a matrix product reaches {about['peak_tflops']:.3g} TFLOP/s; medians of alternating rounds"
    )
    if config.costs:
        write_json(LOGS / config.log_dir / "costs.json", dict(about, costs=measure_costs(bench)))
        return
    say(f"{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|")
    rows = []
    for name in config.jobs:
        rows.append(measure(getattr(bench, name)(), bench, peak, config.seconds))
        say(line_of(rows[-1]))
        write_json(LOGS / config.log_dir / "benchmark.json", dict(about, jobs=rows))


if __name__ == "__main__":
    run_main(main, CONFIG)
