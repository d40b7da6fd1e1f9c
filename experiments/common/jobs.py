"""The jobs that the benchmark times. Each job has a fast form and a plain form (tests/plain.py)."""

import contextlib
import copy
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plain
import torch
from PIL import Image

import train_sampler
import train_vqgan
from hparams import get_hparams
from hparams.resolve import Hparams
from models.build import build_sampler, build_vqgan
from models.canvas import sample_canvas
from models.samplers import Sampler
from utils.core.device import device_name, pick_device
from utils.core.seed import StepRandom, sample_uniforms
from utils.data.batches import one_pass
from utils.data.images import ImageSet
from utils.data.packed import PackedImages
from utils.data.sources import FolderImages
from utils.evaluation import prdc
from utils.evaluation.neighbours import find_candidates
from utils.training import compilation
from utils.training.amp import Precision, cpu_has_bf16
from utils.training.ema import EMA

# Each size has flags for the two stages, and an amount of work for each job. "small" has few codes. Its output layer
# therefore takes as small a part of the time as in the paper's model.
SIZES: dict[str, dict] = {
    "paper": dict(vqgan="--batch_size 4", sampler="--batch_size 20", samples=64, side=256, images=200, rows=10_000),
    "small": dict(
        vqgan="--img_size 64 --ch_mult 1 1 2 --nf 32 --emb_dim 64 --ndf 32 --batch_size 4",
        sampler="--img_size 64 --ch_mult 1 1 2 --codebook_size 128 --bert_n_emb 256 --bert_n_head 4 --bert_n_layers 2 "
        "--batch_size 20",
        samples=8,
        side=64,
        images=40,
        rows=4000,
    ),
}
CANVAS = (32, 16)  # the numbers of rows and columns of codes of the canvas
QUERIES, WIDTH = 16, 2048


@dataclass
class Job:
    """fast() and plain() process the same number of `items` (units of work). flops: whether to count the FLOPs of
    fast()."""

    name: str
    fast: Callable
    plain: Callable
    items: int
    unit: str
    flops: bool = True


class Bench:
    """Holds the device and the number formats, and makes the jobs by name."""

    def __init__(self, device: str = "auto", size: str = "auto", float32: bool = False, compile: str = "auto"):
        """Set up the device. The arguments are the flags of experiments/benchmark.py."""
        self.compile = compile
        self.trash = tempfile.TemporaryDirectory()
        self.device = pick_device(device)
        if size == "auto":
            size = "paper" if self.device.type == "cuda" else "small"
        self.size_name, self.size = size, SIZES[size]
        amp = not float32 and (self.device.type == "cuda" or cpu_has_bf16())
        self.precision = Precision(amp, "auto", self.device)
        self.fused = self.device.type != "mps"

    def about(self) -> dict:
        """Return JSON values about the device and the models, for the file of results."""
        return dict(
            device=describe_device(self.device),
            size=self.size_name,
            torch=torch.__version__,
            precision=self.precision.describe(),
        )

    def vqgan_H(self, more: str = "") -> Hparams:
        words = f"--dataset churches --ema --diff_aug {self.size['vqgan']} {more}"
        return get_hparams("vqgan", "", words.split(), script="train_vqgan")

    def sampler_H(self, more: str = "") -> Hparams:
        words = "--dataset churches --ae_load_dir x --ae_load_step 1 --dry_run --sampler absorbing --ema"
        words = f"{words} {self.size['sampler']} {more}"  # the flags of `more` come last and therefore count
        return get_hparams("sampler", "", words.split(), script="train_sampler")

    def sampler(self, H: Hparams) -> Sampler:
        torch.manual_seed(0)
        sampler = build_sampler(H).to(self.device).eval()
        sampler.fixed_shapes = self.device.type == "cuda"
        return sampler

    def random_ids(self, H: Hparams, n: int) -> torch.Tensor:
        return torch.randint(0, H.codebook_size, (n, H.block_size), device=self.device)

    def in_amp(self, function: Callable, *args: Any) -> Callable:
        """Return a function that calls function(*args) in the fast number format, without gradients."""

        def run() -> None:
            with self.precision.autocast(), torch.no_grad():
                function(*args)

        return run

    # Each of the following methods makes the job of the same name.

    def vqgan_step(self, more: str = "--disc_start_step 0") -> Job:
        """Make one update of stage 1 with the discriminator, LPIPS (random weights) and averages."""
        import lpips

        H = self.vqgan_H(more)
        torch.manual_seed(0)
        model = build_vqgan(H, lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()).to(self.device)
        other = copy.deepcopy(model)
        model = model.to(memory_format=train_vqgan.memory_format(self.device))
        fast = [torch.optim.Adam(m.parameters(), lr=H.lr, fused=self.fused) for m in (model.ae, model.disc)]
        slow = [torch.optim.Adam(m.parameters(), lr=H.lr, foreach=False) for m in (other.ae, other.disc)]
        average, other_average = EMA(model, H.ema_beta, shared=(model.perceptual,)), copy.deepcopy(other)
        compilation.compile_model(model, self.compile, self.device)
        x = torch.rand(H.batch_size, 3, H.img_size, H.img_size, device=self.device)
        step, rng = 10, StepRandom("bench", device=self.device)

        def run_fast() -> None:
            batch = x.contiguous(memory_format=train_vqgan.memory_format(self.device))
            _, x_hat, _ = train_vqgan.generator_step(model, fast[0], self.precision, H, batch, step, rng)
            if step > H.disc_start_step:
                train_vqgan.discriminator_step(model, fast[1], self.precision, H, batch, x_hat, rng)
            average.update(step)

        def run_plain() -> None:
            plain.vqgan_step(other, slow, other_average, H, x, step, rng)

        name = "VQGAN step" if H.disc_start_step < step else "VQGAN step before the discriminator"
        return Job(name, run_fast, run_plain, H.batch_size, "img")

    def vqgan_step_early(self) -> Job:
        """Make one update of stage 1 before the discriminator joins."""
        return self.vqgan_step("--disc_start_step 30001")

    def sampler_step(self, more: str = "") -> Job:
        """Make one update of the absorbing diffusion, including averages."""
        H = self.sampler_H(more)
        model = self.sampler(H).train()
        other = copy.deepcopy(model)
        fast = torch.optim.Adam(model.parameters(), lr=H.lr, fused=self.fused)
        slow = torch.optim.Adam(other.parameters(), lr=H.lr, foreach=False)
        average, other_average = EMA(model, H.ema_beta), copy.deepcopy(other)
        compilation.compile_model(model, self.compile, self.device)
        ids, rng = self.random_ids(H, H.batch_size), StepRandom("bench", device=self.device)

        def run_fast() -> None:
            train_sampler.sampler_step(model, fast, self.precision, ids, rng)
            average.update(1)

        def run_plain() -> None:
            plain.sampler_step(other, slow, other_average, H, ids, rng)

        return Job("sampler step", run_fast, run_plain, H.batch_size, "sequence")

    def sampling(self, steps: int = 256, more: str = "") -> Job:
        """Draw samples of the absorbing diffusion, by default in S = 256 steps."""
        model = self.sampler(self.sampler_H(f"--sample_steps {steps} {more}"))
        other = copy.deepcopy(model)
        compilation.compile_model(model, self.compile, self.device)
        n = self.size["samples"] if steps <= 256 else self.size["samples"] // 2
        u = sample_uniforms(0, range(n), model.draws_per_sample(), self.device)
        run_plain = partial(plain.sample_diffusion, other, u)
        return Job(f"sampling, S = {steps}", self.in_amp(model.sample, u), run_plain, n, "sample")

    def sampling_1000(self) -> Job:
        """Draw samples of the absorbing diffusion in S = 1000 steps."""
        return self.sampling(1000)

    def autoregressive(self) -> Job:
        """Draw samples of the autoregressive prior."""
        model = self.sampler(self.sampler_H("--sampler autoregressive"))
        n = 2 * self.size["samples"]
        u = sample_uniforms(0, range(n), model.draws_per_sample(), self.device)
        run_plain = partial(plain.sample_autoregressive, model, u)
        return Job("autoregressive sampling", self.in_amp(model.sample, u), run_plain, n, "sample", flops=False)

    def likelihood(self) -> Job:
        """Compute the prior's bound. The plain form needs T passes, and the fast form T/8 stratified passes."""
        H = self.sampler_H()
        model, ids = self.sampler(H), self.random_ids(H, self.size["samples"])
        passes = H.total_steps // 8

        def run_fast() -> None:
            model.nll(ids, StepRandom("b", device=self.device), passes)

        def run_plain() -> None:
            plain.nll(model, ids, StepRandom("b", device=self.device))

        name = f"likelihood, {passes} passes for {H.total_steps}"
        return Job(name, self.in_amp(run_fast), run_plain, len(ids), "image")

    def neighbours(self) -> Job:
        """Find the 10 nearest images by LPIPS (AlexNet, random weights)."""
        import lpips

        torch.manual_seed(0)
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False).to(self.device)
        n, side = self.size["images"], self.size["side"]
        images = torch.rand(n, 3, side, side, device=self.device)
        queries = torch.rand(QUERIES, 3, side, side, device=self.device)

        def run_fast() -> None:
            find_candidates(model, queries, zip(images.split(20), torch.arange(n).split(20), strict=True), 10)

        # The second pass computes LPIPS for 20 candidates of each query, for any number of images. Among thousands of
        # images, the second pass takes a small part of the time. It is not timed, because it would dominate here.
        name, run_plain = f"neighbours of {QUERIES} among {n} images, first pass", partial(plain.lpips_distances, model)
        return Job(name, run_fast, partial(run_plain, queries, images), QUERIES * n, "pair", flops=False)

    def larger_images(self) -> Job:
        """Fill a canvas in raster order."""
        # The plain form takes several minutes, but only one minute with a narrower model.
        H = self.sampler_H("--bert_n_emb 128" if self.size_name == "small" else "")
        model, window = self.sampler(H), H.latent_shape[1:]
        u = torch.rand(1, *CANVAS, device=self.device)
        run_plain = partial(plain.sample_canvas, model, u[0], window, 0.8)
        name = f"a canvas of {CANVAS[0]} x {CANVAS[1]} codes"
        return Job(name, self.in_amp(sample_canvas, model, u, window), run_plain, 1, "canvas", flops=False)

    def prdc(self) -> Job:
        """Compute precision, recall, density and coverage. The plain form is the prdc package."""
        from prdc import compute_prdc

        n = self.size["rows"]
        torch.manual_seed(0)
        real, fake = torch.randn(n, WIDTH), torch.randn(n, WIDTH) * 0.97
        run_fast = partial(prdc.prdc, real.to(self.device), fake.to(self.device))

        def run_plain() -> None:
            with contextlib.redirect_stdout(None):
                compute_prdc(real.numpy(), fake.numpy(), 3)

        return Job(f"PRDC of {n} x {WIDTH}", run_fast, run_plain, n, "row", flops=False)

    def images(self) -> Job:
        """Load images as one worker does. The fast form reads the packed cache, and the plain form decodes JPEG
        files."""
        folder = Path(self.trash.name)
        n, random = 50, np.random.default_rng(0)
        for i in range(n):
            coarse = Image.fromarray(random.integers(0, 256, (32, 48, 3), dtype=np.uint8))
            coarse.resize((384, 256), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        source = FolderImages([folder])
        decoded, packed = (ImageSet(source, range(n), 256) for _ in range(2))
        packed.packed = PackedImages(packed, folder)
        packed.packed.write(range(n), one_pass(packed, n, 0))
        run_fast, run_plain = (lambda images=images: list(map(images.load, range(n))) for images in (packed, decoded))
        name = "256 x 256 images for one worker, packed (plain: JPEG)"
        return Job(name, run_fast, run_plain, n, "img", flops=False)


def timed(function: Callable, device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or device_name(device)}, {torch.get_num_threads()} threads"
