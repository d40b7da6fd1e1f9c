"""The fast forms against the plain ones of tests/plain.py: the same numbers up to rounding."""

import copy

import lpips
import plain
import pytest
import torch
from test_samplers import lively

import train_sampler
import train_vqgan
from experiments.calc_nearest_neighbours import find_candidates, nearest_of
from hparams import get_hparams
from models.build import build_vqgan
from models.canvas import sample_canvas
from models.samplers.orders import ORDERS
from utils.core.seed import StepRandom
from utils.training.amp import Precision
from utils.training.ema import EMA

SMALL = (
    "--dataset churches --img_size 16 --nf 32 --ch_mult 1 1 1 --res_blocks 1 --emb_dim 8 --codebook_size 16 "
    "--ndf 8 --disc_layers 1 --ema --ema_beta 0.9 --device cpu"
)
FLOAT32 = Precision(False, "auto", torch.device("cpu"))


def close(a, b):
    return all((x - y).abs().max() <= 1e-4 * x.abs().max() + 1e-5 for x, y in zip(a, b, strict=True))


class SmallLPIPS(torch.nn.Module):
    """In the place of LPIPS, whose VGG takes no images of 16 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, x, y):
        return (self.conv(x) - self.conv(y)).relu().square().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("more", ["", "--diff_aug", "--quantizer gumbel"])
def test_a_step_of_stage_1(more):
    H = get_hparams("vqgan", "", f"{SMALL} --disc_start_step 2 {more}".split())
    torch.manual_seed(0)
    one = build_vqgan(H, SmallLPIPS())
    other = copy.deepcopy(one)
    average, other_average = EMA(one, H.ema_beta, shared=(one.perceptual,)), copy.deepcopy(other)
    optimisers = [[torch.optim.SGD(part.parameters(), 0.1) for part in (m.ae, m.disc)] for m in (one, other)]
    for step in (1, 2, 3, 4):
        x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        rngs = [StepRandom("vqgan", 0, step) for _ in range(2)]
        scalars, x_hat, _ = train_vqgan.generator_step(one, optimisers[0][0], FLOAT32, H, x, step, rngs[0])
        if step > H.disc_start_step:
            scalars.update(train_vqgan.discriminator_step(one, optimisers[0][1], FLOAT32, H, x, x_hat, rngs[0]))
        average.update(step)
        if step < H.disc_start_step and H.diff_aug:
            rngs[1] = SkipsAugmentation(rngs[1])
        expected = plain.vqgan_step(other, optimisers[1], other_average, H, x, step, rngs[1])
        for name in expected.keys() & scalars.keys():
            assert scalars[name].item() == pytest.approx(expected[name], rel=1e-4), (step, name)
        # The statistics of the discriminator's norms differ before it starts: one of the two has run it.
        if step < H.disc_start_step:
            other.disc.load_state_dict(one.disc.state_dict())
    assert close(one.parameters(), other.parameters())
    assert close(average.model.parameters(), other_average.parameters())


class SkipsAugmentation:
    """The plain form augments for a discriminator that does not count yet; that must not use up random numbers."""

    def __init__(self, rng):
        self.rng = rng

    def rand(self, *shape):
        return torch.full(shape, 0.5)


@pytest.mark.parametrize("schedule", ["random", "fixed"])
def test_a_step_of_stage_2(schedule):
    H = get_hparams("sampler", "", f"{SMALL} --sampler absorbing --ae_load_dir x --ae_load_step 1 --dry_run".split())
    one = lively(loss_type="reweighted_elbo", mask_schedule=schedule)
    other = copy.deepcopy(one)
    average, other_average = EMA(one, H.ema_beta), copy.deepcopy(other)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1) for m in (one, other)]
    for step in range(3):
        ids = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(step))
        out = train_sampler.sampler_step(one, optimisers[0], FLOAT32, ids, StepRandom("s", step))
        average.update(step)
        expected = plain.sampler_step(other, optimisers[1], other_average, H, ids, StepRandom("s", step))
        assert out.loss.item() == pytest.approx(expected, rel=1e-4)
    assert close(one.parameters(), other.parameters())
    assert close(average.model.parameters(), other_average.parameters())


@pytest.mark.parametrize("steps", [3, 20, 200])
def test_diffusion_samples(steps):
    model = lively()
    model.S = steps
    u = torch.rand(50, *model.draws_per_sample(), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.sample(u, 0.7), plain.sample_diffusion(model, u, 0.7))


@pytest.mark.parametrize("steps", [3, 16, 40])
def test_samples_in_raster_order(steps):
    model = lively()
    model.S, model.order = steps, ORDERS["raster"]
    u = torch.rand(20, *model.draws_per_sample(), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.sample(u, 0.7), plain.sample_diffusion(model, u, 0.7))


def test_autoregressive_samples():
    model = lively("autoregressive")
    u = torch.rand(50, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.sample(u, 0.7), plain.sample_autoregressive(model, u, 0.7))


@pytest.mark.parametrize("schedule", ["random", "fixed"])
def test_the_bound_by_all_passes(schedule):
    model = lively(mask_schedule=schedule)
    ids = torch.randint(0, 16, (8, 16))
    assert torch.allclose(model.nll(ids, StepRandom("x")), plain.nll(model, ids, StepRandom("x")), rtol=1e-4)


def test_a_canvas():
    model = lively()
    u = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(1))
    ids = sample_canvas(model, u, (4, 4), temp=0.8)
    for canvas, row in zip(ids, u, strict=True):
        assert torch.equal(canvas, plain.sample_canvas(model, row, (4, 4), 0.8))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_nearest_neighbours():
    torch.manual_seed(0)
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    images = torch.rand(12, 3, 32, 32)
    queries = images[:2].flip(-1)
    candidates = find_candidates(model, queries, [(images, torch.arange(12))], 3).tolist()
    found = [nearest_of(model, q, near, lambda i: images[i], 3) for q, near in zip(queries, candidates, strict=True)]
    nearest = plain.lpips_distances(model, queries, images).argsort(dim=1, stable=True)[:, :3]
    assert [[i for _, i in row] for row in found] == nearest.tolist()
