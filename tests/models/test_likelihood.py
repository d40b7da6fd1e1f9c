"""The estimators of the absorbing diffusion's bound against its enumeration, and the pieces they are made of."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from test_samplers import MASKS, STATES, L, tiny

import train_sampler
from models.samplers.bound import balanced_masks, count_weights, stratified_counts
from utils.core.seed import StepRandom
from utils.training.amp import Precision

T = 5  # which does not divide L: fixed masks would give 1, 2, 2, 3, 4 masked tokens, and no bound
SCHEDULES = ["random", "fixed"]  # of training; the bound is the same


def uneven(scale, **given):
    """A network whose tokens differ: its weights are `scale` times larger than at initialisation."""
    model = tiny(**given).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return model


def mask_law(t):
    """Probability of each of MASKS at time t, (16,)."""
    sizes = MASKS.sum(1)
    return (t / T) ** sizes * (1 - t / T) ** (L - sizes)


class Ignorant(torch.nn.Module):
    """A network that knows nothing: all of 1024 codes are equally likely."""

    def forward(self, ids, at):
        return torch.zeros(len(at[0]), 1024)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps,length", [(3, 7), (1000, 16), (1, 4), (16, 16), (50, 3)])
def test_a_network_that_knows_nothing_needs_log2_K_bits(schedule, steps, length):
    n = 4000
    model = tiny(mask_schedule=schedule, total_steps=steps, block_size=length, codebook_size=1024)
    model._denoise_fn = Ignorant()
    ids = torch.zeros(n, length, dtype=torch.int64)
    for passes in (1, 3):
        bits = model.nll(ids, StepRandom("p"), passes=passes) / (length * math.log(2))
        assert torch.allclose(bits, torch.tensor(10.0))
    bits = model.nll(ids[:200], StepRandom("n")) / (length * math.log(2))
    assert abs(bits.mean() - 10) < 4 * bits.std() / math.sqrt(200) + 1e-4
    H = SimpleNamespace(batch_size=n, seed=0, accumulate_steps=1)
    run = SimpleNamespace(device=ids.device, rank=0, world_size=1)
    bits = train_sampler.validate(model, ids, H, run, Precision(False, "auto", ids.device))["val_bits"]
    error = model.validation_loss(ids, StepRandom("v")).bits.std() / math.sqrt(n)
    assert abs(bits - 10) < 4 * error + 1e-4


def test_the_training_loss_keeps_its_schedule():
    model = uneven(2, mask_schedule="fixed", total_steps=T)
    out, of_validation = model.loss(STATES, StepRandom("a")), model.validation_loss(STATES, StepRandom("a"))
    assert torch.equal(out.loss, of_validation.loss) and not torch.equal(out.bits, of_validation.bits)
    model.mask_schedule = "random"
    assert torch.equal(model.loss(STATES, StepRandom("a")).bits, model.validation_loss(STATES, StepRandom("a")).bits)


@torch.no_grad()
def exact_bound(model, x):
    """sum_t E[CE] / t over all masks, for one sequence x (L,) -> float."""
    ce = model.cross_entropy(x.repeat(len(MASKS), 1), MASKS).double()
    return sum(float((mask_law(t) * ce).sum()) / t for t in range(1, T + 1))


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_estimates_are_unbiased(schedule, passes):
    model = uneven(4, mask_schedule=schedule, total_steps=T)
    x, n = STATES[46], 20_000
    nats = model.nll(x.repeat(n, 1), StepRandom("test", passes), passes=passes).double()
    assert nats.shape == (n,)
    error = nats.std() / math.sqrt(n)
    assert error < 0.02 * exact_bound(model, x)  # else the next line would say little
    assert abs(nats.mean() - exact_bound(model, x)) < 4 * error


def test_autoregressive_likelihood_is_exact_whatever_the_passes():
    model = tiny("autoregressive")
    with torch.no_grad():
        assert torch.equal(model.nll(STATES, StepRandom("test"), passes=3), model.nll(STATES))


@pytest.mark.parametrize("length,steps", [(1, 1), (1, 4), (4, 5), (7, 3), (6, 12)])
def test_count_weights(length, steps):
    def weight(m):
        rates = [t / steps for t in range(1, steps + 1)]
        return m * math.comb(length, m) * sum(r**m * (1 - r) ** (length - m) / (r * steps) for r in rates)

    expected = [weight(m) for m in range(1, length + 1)]
    weights = count_weights(steps, length)
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert float(weights.sum()) == pytest.approx(length, rel=1e-12)


@pytest.mark.parametrize("length,steps", [(4096, 4096), (4096, 3), (3, 4096)])
def test_count_weights_of_long_sequences_are_finite(length, steps):
    weights = count_weights(steps, length)
    assert weights.shape == (length,) and weights.isfinite().all() and (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(length, rel=1e-9)


def test_counts_are_one_from_each_stratum():
    u = torch.tensor([0.0, 0.3, 1 - 2**-24])
    even = torch.ones(6, dtype=torch.float64)
    assert stratified_counts(even, u, 6).tolist() == [[1, 2, 3, 4, 5, 6]] * 3
    assert stratified_counts(even, u, 3).tolist() == [[1, 3, 5], [1, 3, 5], [2, 4, 6]]
    # What has no weight is never drawn.
    gaps = torch.tensor([0, 1, 0, 0, 3, 0], dtype=torch.float64)
    assert stratified_counts(gaps, u, 4).tolist() == [[2, 5, 5, 5]] * 3


def test_masks_of_each_size_are_uniform():
    """Each pass, on its own, draws every set of its size equally often."""
    random, n, length = StepRandom("test"), 60_000, 5
    counts = torch.tensor([1, 2, 2, 3, 4]).repeat(n, 1)
    masks = list(balanced_masks(counts, random.rand(n, length).argsort(1)))
    assert len(masks) == 5
    for m, mask in zip(counts[0].tolist(), masks, strict=True):
        assert (mask.sum(1) == m).all()
        codes = (mask * 2 ** torch.arange(length)).sum(1)
        sets = [sum(2**i for i in s) for s in itertools.combinations(range(length), m)]
        found = torch.bincount(codes, minlength=2**length)[sets].double()
        expected = n / len(sets)
        assert chi2.sf(float(((found - expected) ** 2 / expected).sum()), len(sets) - 1) > 1e-3


def test_masks_share_the_weight_evenly():
    length, passes, n = 64, 16, 200
    random = StepRandom("test")
    counts = stratified_counts(count_weights(64, length), random.rand(n), passes)

    def spread(masks):
        """Standard deviation over the tokens of the weight that each has in all passes, mean over the samples."""
        total = sum(mask / m for mask, m in zip(masks, counts[:, :, None].unbind(1), strict=True))
        assert torch.allclose(total.sum(1), torch.full((n,), float(passes)))
        return total.std(1).mean()

    balanced = spread(balanced_masks(counts, random.rand(n, length).argsort(1)))
    independent = spread([random.rand(n, length).argsort(1).argsort(1) < m for m in counts[:, :, None].unbind(1)])
    assert balanced < independent / 2  # measured: 3.3


def test_estimates_follow_from_the_random_numbers():
    model = uneven(2, total_steps=T)
    x = STATES[[46, 46, 7]]
    first = model.nll(x, StepRandom("a"), passes=3)
    assert torch.equal(first, model.nll(x, StepRandom("a"), passes=3))
    assert not torch.equal(first, model.nll(x, StepRandom("b"), passes=3))
    assert first[0] != first[1]  # each sample has masks of its own


def test_variance_is_far_below_the_originals():
    steps, length, n = 32, 16, 500
    model = uneven(2, total_steps=steps, block_size=length, codebook_size=8, bert_n_emb=16)
    x = torch.randint(0, 8, (1, length), generator=torch.Generator().manual_seed(0)).repeat(n, 1)
    original = model.nll(x, StepRandom("o")).double().var()
    # Measured: 219 times with as many passes, 4.2 times with an eighth of them.
    assert model.nll(x, StepRandom("s"), passes=steps).double().var() < original / 20
    assert model.nll(x, StepRandom("s"), passes=steps // 8).double().var() < original / 1.5
