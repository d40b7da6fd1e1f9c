"""How fast each job of the program is, beside its plain form, in one run: the two take turns, medians are shown."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hparams.config import flags_of, opt
from hparams.parser import build_parser
from hparams.sources import checked, run_folder

JOBS = ("vqgan_step", "vqgan_step_early", "sampler_step", "sampling", "sampling_1000", "autoregressive", "likelihood",
        "neighbours", "larger_images", "prdc", "images")  # fmt: skip


@dataclass
class BenchmarkConfig:
    """benchmark"""

    jobs: list[str] = opt(list(JOBS), "what to time", choices=JOBS)
    size: str = opt("auto", "of the models: paper (256 x 256 pixels, 24 layers) or small; auto: paper on CUDA",
                    choices=["auto", "paper", "small"])  # fmt: skip
    costs: bool = opt(False, "instead: how the fast forms' time and memory grow with latents, batch, layers, steps")
    seconds: float = opt(20.0, "time for each job; each form runs twice at least", above=0.0)
    device: str = opt("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    compile: str = opt("auto", "torch.compile in the fast forms of the steps and of sampling; auto: on CUDA",
                       choices=["auto", "on", "off"])  # fmt: skip
    threads: int = opt(None, "threads of a CPU (default: PyTorch's choice)", min=1, max=1024)
    log_dir: str = opt("benchmark", "folder under logs/ for benchmark.json", metavar="NAME")


EPILOG = """The plain forms (tests/plain.py) are the definitions written out: float32, explicit attention matrices, the
network over all positions at every step, one pair at a time. The fast forms are what the scripts run, with --amp
where the device has bf16. The share of the peak is of a large matrix product in the same run and number format.

example:
  python experiments/benchmark.py --jobs sampling sampler_step --seconds 60
"""


def parse(argv=None):
    """The command line -> BenchmarkConfig."""
    flags = flags_of((BenchmarkConfig,))
    parser = build_parser(flags, "Time each job beside its plain form.", EPILOG)
    given = parser.parse(argv)
    try:
        values = {f.name: checked(f, given[f.name]) for f in flags if f.name in given}
        config = BenchmarkConfig(**values)
        run_folder(config.log_dir)
    except ValueError as error:
        parser.error(str(error))
    return config


if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered at once
    CONFIG = parse()

import contextlib
import copy
import platform
import statistics
import tempfile
import time
import warnings

import numpy as np
import plain
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_sampler
import train_vqgan
from hparams import get_hparams
from models.canvas import sample_canvas
from models.perceptual import find_candidates
from models.samplers import build_sampler
from models.vqgan import VQGAN
from utils import compilation, distributed, prdc
from utils.amp import Precision, cpu_has_bf16
from utils.checkpoint import LOGS
from utils.data import ImageSet, one_pass
from utils.ema import EMA
from utils.errors import run_main
from utils.io import write_json
from utils.packed import PackedImages
from utils.progress import say
from utils.run import device_name, pick_device
from utils.seed import StepRandom, sample_uniforms
from utils.sources import FolderImages

# Of each size: flags of the two stages, and how much of each job.
SIZES = {
    "paper": dict(
        vqgan="--batch_size 4", sampler="--batch_size 20", samples=64, canvas=(32, 16), images=200, queries=16,
        features=(10_000, 2048),
    ),
    "small": dict(  # few codes, so that the head weighs as little as in the paper's model
        vqgan="--img_size 64 --ch_mult 1 1 2 --nf 32 --emb_dim 64 --ndf 32 --batch_size 4",
        sampler="--img_size 64 --ch_mult 1 1 2 --codebook_size 128 --bert_n_emb 256 --bert_n_head 4 --bert_n_layers 2 "
                "--batch_size 20",
        samples=4, canvas=(32, 16), images=40, queries=16, features=(4000, 2048),
    ),
}  # fmt: skip


@dataclass
class Job:
    """fast() and plain() do the same `items` (units of work); flops: of one fast(), where they are counted."""

    name: str
    fast: object
    plain: object
    items: int
    unit: str
    flops: bool = True


class Bench:
    """The device, the number formats, and the jobs by name."""

    def __init__(self, config):
        self.config = config
        self.trash = tempfile.TemporaryDirectory()
        self.device = pick_device(config.device)
        size = config.size if config.size != "auto" else "paper" if self.device.type == "cuda" else "small"
        self.size_name, self.size = size, SIZES[size]
        amp = self.device.type == "cuda" or cpu_has_bf16()
        self.precision = Precision(amp, "auto", self.device)

    def compile(self, model):
        """As the scripts do where there is much to compute."""
        if compilation.pays(self.config.compile, self.device):
            compilation.compile_parts(self.config.compile, model.parts_to_compile())

    def vqgan_H(self, more=""):
        words = f"--dataset churches --ema --diff_aug {self.size['vqgan']} {more}"
        return get_hparams("vqgan", "", words.split(), script="train_vqgan")

    def sampler_H(self, more=""):
        words = "--dataset churches --ae_load_dir x --ae_load_step 1 --dry_run --sampler absorbing --ema"
        words = f"{words} {self.size['sampler']} {more}"  # of a flag that comes twice the last one holds
        return get_hparams("sampler", "", words.split(), script="train_sampler")

    def sampler(self, H):
        torch.manual_seed(0)
        return build_sampler(H).to(self.device).eval()

    def random_ids(self, H, n):
        return torch.randint(0, H.codebook_size, (n, H.block_size), device=self.device)

    # Each method below is a job of that name.

    def vqgan_step(self, more="--disc_start_step 0"):
        """One update of stage 1, LPIPS (random weights) and averages included; with the discriminator."""
        import lpips

        H = self.vqgan_H(more)
        torch.manual_seed(0)
        model = VQGAN(H, lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()).to(self.device)
        other = copy.deepcopy(model)
        model = model.to(memory_format=train_vqgan.memory_format(self.device))
        fused = self.device.type == "cuda"
        fast = [torch.optim.Adam(m.parameters(), lr=H.lr, fused=fused) for m in (model.ae, model.disc)]
        slow = [torch.optim.Adam(m.parameters(), lr=H.lr, foreach=False) for m in (other.ae, other.disc)]
        average = EMA(model, H.ema_beta, shared=(model.perceptual,))
        other_average = copy.deepcopy(other)
        self.compile(model)
        x = torch.rand(H.batch_size, 3, H.img_size, H.img_size, device=self.device)
        rng = StepRandom("bench", device=self.device)
        step = 10

        def run_fast():
            batch = x.contiguous(memory_format=train_vqgan.memory_format(self.device))
            _, x_hat, _ = train_vqgan.generator_step(model, fast[0], self.precision, H, batch, step, rng)
            if step > H.disc_start_step:
                train_vqgan.discriminator_step(model, fast[1], self.precision, H, batch, x_hat, rng)
            average.update()

        name = "VQGAN step" if H.disc_start_step < step else "VQGAN step before the discriminator"
        return Job(name, run_fast, lambda: plain.vqgan_step(other, slow, other_average, H, x, step, rng),
                   H.batch_size, "img")  # fmt: skip

    def vqgan_step_early(self):
        """Before the discriminator joins."""
        return self.vqgan_step("--disc_start_step 30001")

    def sampler_step(self, more=""):
        """One update of the absorbing diffusion, averages included."""
        H = self.sampler_H(more)
        model = self.sampler(H).train()
        other = copy.deepcopy(model)
        fast = torch.optim.Adam(model.parameters(), lr=H.lr, fused=self.device.type == "cuda")
        slow = torch.optim.Adam(other.parameters(), lr=H.lr, foreach=False)
        average, other_average = EMA(model, H.ema_beta), copy.deepcopy(other)
        self.compile(model)
        ids, rng = self.random_ids(H, H.batch_size), StepRandom("bench", device=self.device)

        def run_fast():
            train_sampler.sampler_step(model, fast, self.precision, ids, rng)
            average.update()

        return Job("sampler step", run_fast, lambda: plain.sampler_step(other, slow, other_average, H, ids, rng),
                   H.batch_size, "sequence")  # fmt: skip

    def sampling(self, steps=256, more=""):
        """Samples of the absorbing diffusion in S = 256 steps."""
        H = self.sampler_H(f"--sample_steps {steps} {more}")
        model = self.sampler(H)
        other = copy.deepcopy(model)
        self.compile(model)
        n = self.size["samples"]
        u = sample_uniforms(0, range(n), model.draws_per_sample(), self.device)
        return Job(f"sampling, S = {steps}", lambda: self.in_amp(model.sample, u),
                   lambda: plain.sample_diffusion(other, u), n, "sample")  # fmt: skip

    def sampling_1000(self):
        """In S = 1000 steps."""
        return self.sampling(1000)

    def in_amp(self, function, *args):
        with self.precision.autocast(), torch.no_grad():
            return function(*args)

    def autoregressive(self):
        """Samples of the autoregressive prior."""
        H = self.sampler_H("--sampler autoregressive")
        model = self.sampler(H)
        n = 4 * self.size["samples"]
        u = sample_uniforms(0, range(n), model.draws_per_sample(), self.device)
        return Job("autoregressive sampling", lambda: self.in_amp(model.sample, u),
                   lambda: plain.sample_autoregressive(model, u), n, "sample", flops=False)  # fmt: skip

    def likelihood(self):
        """The prior's bound: T passes, or an eighth as many, stratified."""
        H = self.sampler_H()
        model = self.sampler(H)
        ids = self.random_ids(H, self.size["samples"])
        passes = H.total_steps // 8
        return Job(f"likelihood, {passes} passes for {H.total_steps}",
                   lambda: self.in_amp(lambda: model.nll(ids, StepRandom("b", device=self.device), passes)),
                   lambda: plain.nll(model, ids, StepRandom("b", device=self.device)), len(ids), "image")  # fmt: skip

    def neighbours(self):
        """The 10 nearest images by LPIPS (AlexNet, random weights)."""
        import lpips

        torch.manual_seed(0)
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False).to(self.device)
        side = 256 if self.size_name == "paper" else 64
        images = torch.rand(self.size["images"], 3, side, side, device=self.device)
        queries = torch.rand(self.size["queries"], 3, side, side, device=self.device)

        def fast():
            batches = zip(images.split(20), torch.arange(len(images)).split(20), strict=True)
            return find_candidates(model, queries, batches, 10)

        # The second pass, LPIPS itself for 20 candidates a query however many images there are, would weigh here as it
        # never does among thousands.
        return Job(f"neighbours of {len(queries)} among {len(images)} images, first pass", fast,
                   lambda: plain.lpips_distances(model, queries, images), len(queries) * len(images), "pair",
                   flops=False)  # fmt: skip

    def larger_images(self):
        """A canvas in raster order."""
        H = self.sampler_H()
        model = self.sampler(H)
        shape, window = self.size["canvas"], H.latent_shape[1:]
        u = torch.rand(1, *shape, device=self.device)
        name = f"a canvas of {shape[0]} x {shape[1]} codes"
        return Job(name, lambda: self.in_amp(sample_canvas, model, u, window),
                   lambda: plain.sample_canvas(model, u[0], window, 0.8), 1, "canvas", flops=False)  # fmt: skip

    def prdc(self):
        """Precision, recall, density, coverage; the plain form is the prdc package."""
        from prdc import compute_prdc

        n, width = self.size["features"]
        torch.manual_seed(0)
        real, fake = torch.randn(n, width), torch.randn(n, width) * 0.97
        on_device = real.to(self.device), fake.to(self.device)

        def plainly():
            with contextlib.redirect_stdout(None):
                return compute_prdc(real.numpy(), fake.numpy(), 3)

        return Job(f"PRDC of {n} x {width}", lambda: prdc.prdc(*on_device), plainly, n, "row", flops=False)

    def images(self):
        """What one worker delivers: 256 x 256 pixels from the packed cache, or decoded from photo-like JPEG files."""
        folder = Path(self.trash.name)
        n, random = 50, np.random.default_rng(0)
        for i in range(n):
            coarse = Image.fromarray(random.integers(0, 256, (32, 48, 3), dtype=np.uint8))
            coarse.resize((384, 256), Image.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        source = FolderImages([folder])
        decoded, packed = (ImageSet(source, range(n), 256) for _ in range(2))
        packed.packed = PackedImages(packed, folder)
        packed.packed.write(range(n), one_pass(packed, n, 0))
        return Job("256 x 256 images for one worker, packed (plain: JPEG)", lambda: [packed.load(i) for i in range(n)],
                   lambda: [decoded.load(i) for i in range(n)], n, "img", flops=False)  # fmt: skip


# ---------------------------------------------------------------------- measuring


class PeakMemory:
    """Context manager: `mib`, the most CUDA memory in use within it beyond what there was; None on other devices,
    where what an earlier job has freed hides what this one needs."""

    def __init__(self, device):
        self.cuda, self.mib = device.type == "cuda", None

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        if self.cuda:
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20


def timed(function, device):
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(device, dtype):
    """FLOP/s of a large matrix product, the best of some."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5))


class FlopCounter(TorchDispatchMode):
    """Sums up what PyTorch's formulas give for each operation. (Its own FlopCounterMode also asks which module an
    operation belongs to, and cannot when gradients are taken at a weight.)"""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(job):
    """FLOPs of one fast(), or None."""
    if not job.flops:
        return None
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        job.fast()
    return counter.total


def measure(job, bench, peak):
    """The two forms in turns for about --seconds -> a row of the table."""
    rows = {}
    for form in ("fast", "plain"):  # the first calls warm up
        with PeakMemory(bench.device) as memory:
            getattr(job, form)()
        rows[form] = dict(mib=memory.mib, times=[])
    flops = count_flops(job)
    end = time.monotonic() + bench.config.seconds
    while time.monotonic() < end or len(rows["plain"]["times"]) < 2:
        for form in rows:
            rows[form]["times"].append(timed(getattr(job, form), bench.device))
    seconds = {form: statistics.median(row["times"]) for form, row in rows.items()}
    ratios = [p / f for f, p in zip(rows["fast"]["times"], rows["plain"]["times"], strict=True)]
    return dict(
        job=job.name, unit=job.unit, ratio=statistics.median(ratios), rounds=len(ratios),
        **{f"{form}_per_second": job.items / seconds[form] for form in rows},
        **{f"{form}_mib": rows[form]["mib"] for form in rows},
        gflops_per_item=flops and flops / job.items / 1e9,
        share_of_peak=flops and flops / seconds["fast"] / peak,
    )  # fmt: skip


def growing(bench):
    """What grows, from value to value: (title, the job's method, [(value, the method's argument)])."""
    H = bench.sampler_H()
    side = H.img_size // H.latent_shape[1]  # pixels a code
    latents = [(f"{n} x {n}", f"--img_size {n * side}") for n in (8, 16, 32, 64)]
    yield "VQGAN step, latents", bench.vqgan_step, latents[:3]
    yield "VQGAN step, batch", bench.vqgan_step, [(n, f"--batch_size {n}") for n in (1, 2, 4, 8)]
    yield "sampler step, latents", bench.sampler_step, [(v, f"{f} --batch_size 2") for v, f in latents]
    yield "sampler step, batch", bench.sampler_step, [(n, f"--batch_size {n}") for n in (4, 8, 16, 32)]
    yield "sampler step, layers", bench.sampler_step, [(n, f"--bert_n_layers {n}") for n in (2, 4, 8, 16)]
    yield "sampling, steps", bench.sampling, [(n, n) for n in (16, 64, 256, 1024)]
    yield "sampling, latents", lambda more: bench.sampling(64, more), latents[:3]


def measure_costs(bench):
    """Print and return rows: seconds, MiB and FLOPs of each value, the latter as multiples of the first value's."""
    say("| what grows | value | seconds | time | FLOPs | memory |\n|---|---|---|---|---|---|")
    rows = []
    for title, make, values in growing(bench):
        first = None
        for value, argument in values:
            job = make(argument)
            with PeakMemory(bench.device) as memory:
                job.fast()
            flops = count_flops(job)
            seconds = statistics.median(timed(job.fast, bench.device) for _ in range(3))
            first = first or (seconds, flops)
            row = dict(what=title, value=str(value), seconds=seconds, mib=memory.mib, gflops=flops / 1e9)
            rows.append(row)
            say(f"| {title} | {value} | {seconds:.3g} | x {seconds / first[0]:.2f} | x {flops / first[1]:.2f} "
                f"| {in_mib(memory.mib)} |")  # fmt: skip
    return rows


def describe_device(device):
    if device.type == "cuda":
        return device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or device_name(device)}, {torch.get_num_threads()} threads"


HEAD = "| job | fast | plain | ratio | share of peak | GFLOP each | memory, fast | memory, plain |"


def in_mib(value):
    return "" if value is None else f"{value:.0f} MiB"


def line_of(row):
    """A row as a line of a Markdown table."""
    share = f"{100 * row['share_of_peak']:.0f}%" if row["share_of_peak"] else ""
    flops = f"{row['gflops_per_item']:.3g}" if row["gflops_per_item"] else ""
    fast, slow = (f"{row[f'{form}_per_second']:.3g} {row['unit']}/s" for form in ("fast", "plain"))
    memory = " | ".join(in_mib(row[f"{form}_mib"]) for form in ("fast", "plain"))
    return f"| {row['job']} | {fast} | {slow} | {row['ratio']:.2f} | {share} | {flops} | {memory} |"


def main(config):
    if distributed.world_size() > 1:
        from experiments import scaling  # which imports this module

        return scaling.main(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
    bench = Bench(config)
    peak = peak_flops(bench.device, bench.precision.dtype)
    about = dict(device=describe_device(bench.device), size=bench.size_name, torch=torch.__version__,
                 precision=bench.precision.describe(), peak_tflops=peak / 1e12)  # fmt: skip
    say(f"{about['device']}; {about['size']} models; fast forms in {about['precision']}, plain ones in float32; "
        f"a matrix product reaches {about['peak_tflops']:.3g} TFLOP/s; medians of rounds in turns")  # fmt: skip
    if config.costs:
        write_json(LOGS / config.log_dir / "costs.json", dict(about, costs=measure_costs(bench)))
        return
    say(f"{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|")
    rows = []
    for name in config.jobs:
        rows.append(measure(getattr(bench, name)(), bench, peak))
        say(line_of(rows[-1]))
        write_json(LOGS / config.log_dir / "benchmark.json", dict(about, jobs=rows))


if __name__ == "__main__":
    run_main(main, CONFIG)
