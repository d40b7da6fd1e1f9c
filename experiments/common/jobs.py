"""The jobs that the benchmark times, each in its fast form and in its plain form (tests/plain.py)."""

import contextlib
import copy
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plain
import torch
from PIL import Image

import train_sampler
import train_vqgan
from hparams import get_hparams
from models.canvas import sample_canvas
from models.samplers import build_sampler
from models.vqgan import VQGAN
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

# For each size: the flags of the two stages, and the amount of work of each job.
SIZES = {
    "paper": dict(
        vqgan="--batch_size 4",
        sampler="--batch_size 20",
        samples=64,
        canvas=(32, 16),
        images=200,
        queries=16,
        features=(10_000, 2048),
    ),
    "small": dict(  # few codes, so that the head weighs as little as in the paper's model
        vqgan="--img_size 64 --ch_mult 1 1 2 --nf 32 --emb_dim 64 --ndf 32 --batch_size 4",
        sampler="--img_size 64 --ch_mult 1 1 2 --codebook_size 128 --bert_n_emb 256 --bert_n_head 4 --bert_n_layers 2 "
        "--batch_size 20",
        samples=8,
        canvas=(32, 16),
        images=40,
        queries=16,
        features=(4000, 2048),
    ),
}


@dataclass
class Job:
    """fast() and plain() do the same number of `items` (units of work). flops: whether to count those of fast()."""

    name: str
    fast: object
    plain: object
    items: int
    unit: str
    flops: bool = True


class Bench:
    """The device, the number formats, and the jobs by name."""

    def __init__(self, device="auto", size="auto", float32=False, compile="auto"):
        """The arguments are the flags of experiments/benchmark.py."""
        self.compile = compile
        self.trash = tempfile.TemporaryDirectory()
        self.device = pick_device(device)
        if size == "auto":
            size = "paper" if self.device.type == "cuda" else "small"
        self.size_name, self.size = size, SIZES[size]
        amp = not float32 and (self.device.type == "cuda" or cpu_has_bf16())
        self.precision = Precision(amp, "auto", self.device)

    def vqgan_H(self, more=""):
        words = f"--dataset churches --ema --diff_aug {self.size['vqgan']} {more}"
        return get_hparams("vqgan", "", words.split(), script="train_vqgan")

    def sampler_H(self, more=""):
        words = "--dataset churches --ae_load_dir x --ae_load_step 1 --dry_run --sampler absorbing --ema"
        words = f"{words} {self.size['sampler']} {more}"  # if a flag occurs twice, the last one counts
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
        fused = self.device.type != "mps"
        fast = [torch.optim.Adam(m.parameters(), lr=H.lr, fused=fused) for m in (model.ae, model.disc)]
        slow = [torch.optim.Adam(m.parameters(), lr=H.lr, foreach=False) for m in (other.ae, other.disc)]
        average = EMA(model, H.ema_beta, shared=(model.perceptual,))
        other_average = copy.deepcopy(other)
        compilation.compile_model(model, self.compile, self.device)
        x = torch.rand(H.batch_size, 3, H.img_size, H.img_size, device=self.device)
        rng = StepRandom("bench", device=self.device)
        step = 10

        def run_fast():
            batch = x.contiguous(memory_format=train_vqgan.memory_format(self.device))
            _, x_hat, _ = train_vqgan.generator_step(model, fast[0], self.precision, H, batch, step, rng)
            if step > H.disc_start_step:
                train_vqgan.discriminator_step(model, fast[1], self.precision, H, batch, x_hat, rng)
            average.update(step)

        name = "VQGAN step" if H.disc_start_step < step else "VQGAN step before the discriminator"
        return Job(
            name, run_fast, lambda: plain.vqgan_step(other, slow, other_average, H, x, step, rng), H.batch_size, "img"
        )

    def vqgan_step_early(self):
        """Before the discriminator joins."""
        return self.vqgan_step("--disc_start_step 30001")

    def sampler_step(self, more=""):
        """One update of the absorbing diffusion, averages included."""
        H = self.sampler_H(more)
        model = self.sampler(H).train()
        other = copy.deepcopy(model)
        fast = torch.optim.Adam(model.parameters(), lr=H.lr, fused=self.device.type != "mps")
        slow = torch.optim.Adam(other.parameters(), lr=H.lr, foreach=False)
        average, other_average = EMA(model, H.ema_beta), copy.deepcopy(other)
        compilation.compile_model(model, self.compile, self.device)
        ids, rng = self.random_ids(H, H.batch_size), StepRandom("bench", device=self.device)

        def run_fast():
            train_sampler.sampler_step(model, fast, self.precision, ids, rng)
            average.update(1)

        return Job(
            "sampler step",
            run_fast,
            lambda: plain.sampler_step(other, slow, other_average, H, ids, rng),
            H.batch_size,
            "sequence",
        )

    def sampling(self, steps=256, more=""):
        """Samples of the absorbing diffusion in S = 256 steps."""
        H = self.sampler_H(f"--sample_steps {steps} {more}")
        model = self.sampler(H)
        other = copy.deepcopy(model)
        compilation.compile_model(model, self.compile, self.device)
        n = self.size["samples"] if steps <= 256 else self.size["samples"] // 2
        u = sample_uniforms(0, range(n), model.draws_per_sample(), self.device)
        return Job(
            f"sampling, S = {steps}",
            lambda: self.in_amp(model.sample, u),
            lambda: plain.sample_diffusion(other, u),
            n,
            "sample",
        )

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
        n = 2 * self.size["samples"]
        u = sample_uniforms(0, range(n), model.draws_per_sample(), self.device)
        return Job(
            "autoregressive sampling",
            lambda: self.in_amp(model.sample, u),
            lambda: plain.sample_autoregressive(model, u),
            n,
            "sample",
            flops=False,
        )

    def likelihood(self):
        """The prior's bound: T passes, or an eighth as many, stratified."""
        H = self.sampler_H()
        model = self.sampler(H)
        ids = self.random_ids(H, self.size["samples"])
        passes = H.total_steps // 8
        return Job(
            f"likelihood, {passes} passes for {H.total_steps}",
            lambda: self.in_amp(lambda: model.nll(ids, StepRandom("b", device=self.device), passes)),
            lambda: plain.nll(model, ids, StepRandom("b", device=self.device)),
            len(ids),
            "image",
        )

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
        return Job(
            f"neighbours of {len(queries)} among {len(images)} images, first pass",
            fast,
            lambda: plain.lpips_distances(model, queries, images),
            len(queries) * len(images),
            "pair",
            flops=False,
        )

    def larger_images(self):
        """A canvas in raster order."""
        # The plain form takes minutes; narrower, it takes one.
        H = self.sampler_H("--bert_n_emb 128" if self.size_name == "small" else "")
        model = self.sampler(H)
        shape, window = self.size["canvas"], H.latent_shape[1:]
        u = torch.rand(1, *shape, device=self.device)
        name = f"a canvas of {shape[0]} x {shape[1]} codes"
        return Job(
            name,
            lambda: self.in_amp(sample_canvas, model, u, window),
            lambda: plain.sample_canvas(model, u[0], window, 0.8),
            1,
            "canvas",
            flops=False,
        )

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
        return Job(
            "256 x 256 images for one worker, packed (plain: JPEG)",
            lambda: [packed.load(i) for i in range(n)],
            lambda: [decoded.load(i) for i in range(n)],
            n,
            "img",
            flops=False,
        )


def timed(function, device):
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def describe_device(device):
    if device.type == "cuda":
        return device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or device_name(device)}, {torch.get_num_threads()} threads"
