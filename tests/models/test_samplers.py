"""The priors against closed forms: exact laws by enumeration, likelihoods by summation."""

import functools
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import DEFAULTS
from scipy.stats import chi2

from models.build import build_sampler
from models.fast import CachedDecoder, rounded_up
from models.samplers.absorbing import scatter_last
from models.samplers.base import draw_codes, invert_cdf
from models.samplers.orders import ORDERS, Order
from models.samplers.reveal import events_of
from utils.core.seed import StepRandom, sample_uniforms

K, L = 3, 4
STATES = torch.tensor(list(itertools.product(range(K), repeat=L)))  # (81, 4): all sequences
MASKS = torch.tensor(list(itertools.product([False, True], repeat=L)))  # (16, 4)


def tiny(sampler="absorbing", **given):
    values = dict(
        sampler=sampler,
        codebook_size=K,
        block_size=L,
        latent_shape=[1, 1, given.get("block_size", L)],
        bert_n_emb=8,
        bert_n_head=2,
        bert_n_layers=2,
        loss_type="elbo",
        total_steps=5,
        sample_steps=5,
    )
    torch.manual_seed(0)
    return build_sampler(SimpleNamespace(**{**DEFAULTS, **values, **given}))


def lively(name="absorbing", **given):
    """A sampler of 16 codes that looks at its context and draws all of them."""
    model = tiny(name, **{**dict(block_size=16, codebook_size=16, total_steps=20, sample_steps=20), **given})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model.net.pos_emb.normal_(generator=torch.Generator().manual_seed(2))
    return model.eval()


def data_distribution(seed=1):
    """A joint distribution over STATES with strong dependence between the tokens, (81,)."""
    logits = torch.randn(len(STATES), generator=torch.Generator().manual_seed(seed)) * 1.5
    return logits.double().softmax(0)


class Oracle(torch.nn.Module):
    """The perfect denoiser of a known distribution: p(x_i | the unmasked tokens), by summation."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, ids, at=None):
        fits = ((ids[:, None] == STATES) | (ids[:, None] == K)).all(-1)  # (B, 81)
        weight = fits * self.p
        marginals = torch.stack([(weight[:, :, None] * (v == STATES)).sum(1) for v in range(K)], -1)  # (B, L, K)
        return (marginals / marginals.sum(-1, keepdim=True)).log()[... if at is None else at]


def with_oracle(p, **given):
    model = tiny(**given)
    model._denoise_fn = Oracle(p)
    return model


def conditional(p, x, masked, revealed):
    """prod over the revealed tokens of p(x_i | unmasked tokens of x), for each row of x (n, L)."""
    at = revealed.expand(len(x), -1).nonzero(as_tuple=True)
    log_p = Oracle(p)(x.masked_fill(masked, K), at).gather(1, x[at][:, None]).squeeze(1)
    return torch.zeros(len(x), dtype=log_p.dtype).index_add(0, at[0], log_p).exp()


def law_of_sampling(p, steps):
    """Exact distribution over STATES of S-step sampling with the oracle: mean over all reveal times."""
    law = torch.zeros(len(STATES), dtype=torch.float64)
    for times in itertools.product(range(1, steps + 1), repeat=L):
        times = torch.tensor(times)
        probability = torch.ones(len(STATES), dtype=torch.float64)
        for t in range(steps, 0, -1):
            if (times == t).any():
                probability *= conditional(p, STATES, times <= t, times == t)
        law += probability / steps**L
    return law


def chi_square_p(ids, law, possible=slice(None)):
    """p-value of the counts of ids (n, L) against a law over STATES, of which all ids must be `possible`."""
    index = (ids * torch.tensor([K ** (L - 1 - i) for i in range(L)])).sum(1)
    counts = torch.bincount(index, minlength=len(STATES)).double()
    counts, expected = counts[possible], law[possible] * len(ids)
    assert expected.min() > 1 and counts.sum() == len(ids)
    return chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1)


def draws(model, n, seed=0, temp=1.0):
    u = torch.rand(n, *model.draws_per_sample(), generator=torch.Generator().manual_seed(seed))
    return model.sample(u, temp)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sampling_follows_its_exact_law(steps):
    p = data_distribution()
    law = law_of_sampling(p, steps)
    assert abs(law.sum() - 1) < 1e-9
    assert chi_square_p(draws(with_oracle(p, sample_steps=steps), 40_000), law) > 1e-3


def test_perfect_denoiser_reproduces_the_data():
    # With so many steps no two tokens are revealed at once, so that nothing is drawn independently.
    p = data_distribution()
    assert chi_square_p(draws(with_oracle(p, sample_steps=1_000_000), 40_000), p) > 1e-3
    # The test is able to fail: one step draws all tokens independently.
    assert chi_square_p(draws(with_oracle(p, sample_steps=1), 40_000), p) < 1e-6


def test_sampling_equals_the_plain_loop_over_all_steps():
    """Visit every t = S..1 and reveal each masked token with probability 1/t: the definition."""
    p, steps, n = data_distribution(), 4, 40_000
    model = with_oracle(p, sample_steps=steps)
    random = torch.Generator().manual_seed(3)
    ids = torch.full((n, L), K)
    for t in range(steps, 0, -1):
        reveal = (ids == K) & (torch.rand(n, L, generator=random) < 1 / t)
        at = reveal.nonzero(as_tuple=True)
        ids[at] = draw_codes(model._denoise_fn(ids, at), torch.rand(len(at[0]), generator=random))
    law = law_of_sampling(p, steps)
    assert chi_square_p(ids, law) > 1e-3
    assert chi_square_p(draws(model, n), law) > 1e-3


def test_mlm_sampling_of_independent_tokens():
    marginals = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.25, 0.25, 0.5]]).double()
    p = marginals[torch.arange(L), STATES].prod(1)
    assert chi_square_p(draws(with_oracle(p, sample_type="mlm", sample_steps=6), 40_000), p) > 1e-3


# ---------------------------------------------------------------------- likelihood


def enumerated_bound(p, x, T):
    """sum_t 1/t E_mask[CE_t] for each row of x, by summation over all masks, in nats."""
    bound = torch.zeros(len(x), dtype=torch.float64)
    for mask in MASKS[1:]:
        ce = -conditional_log(p, x, mask)
        for t in range(1, T + 1):
            rate = t / T
            bound += ce * rate ** int(mask.sum()) * (1 - rate) ** int((~mask).sum()) / t
    return bound


def conditional_log(p, x, mask):
    """Sum of log p(x_i | unmasked) over the masked tokens."""
    return conditional(p, x, mask, mask).log()


def test_enumerated_bound_is_a_bound_and_becomes_exact():
    p = data_distribution()
    exact = -p.log()
    coarse, fine = enumerated_bound(p, STATES, 5), enumerated_bound(p, STATES, 3000)
    # A bound on the average (KL >= 0), which the perfect denoiser closes as T grows.
    assert (p * coarse).sum() > (p * exact).sum() + 1e-3
    assert (p * fine).sum() >= (p * exact).sum() - 1e-9
    assert torch.allclose(fine, exact, atol=5e-3)


def test_nll_is_unbiased_for_the_enumerated_bound():
    p, x = data_distribution(), STATES[[0, 17, 80]]
    model = with_oracle(p, total_steps=5)
    expected = enumerated_bound(p, x, 5)
    n = 4000
    nats = model.nll(x.repeat(n, 1), StepRandom("test")).view(n, 3).double()
    z = (nats.mean(0) - expected) / (nats.std(0) / math.sqrt(n))
    assert z.abs().max() < 4


def test_training_bits_are_unbiased_for_the_enumerated_bound():
    p, x = data_distribution(), STATES[[5, 40, 66]]
    model = with_oracle(p, total_steps=5)
    expected = enumerated_bound(p, x, 5) / (L * math.log(2))
    n = 20_000
    bits = model.loss(x.repeat(n, 1), StepRandom("test")).bits.view(n, 3).double()
    z = (bits.mean(0) - expected) / (bits.std(0) / math.sqrt(n))
    assert z.abs().max() < 4


def test_fixed_schedule_masks_exactly():
    model = tiny(mask_schedule="fixed", total_steps=8)
    t = torch.arange(1, 9).repeat_interleave(50)
    counts = model.mask_of(t, torch.rand(len(t), 4)).sum(1)
    assert torch.equal(counts, (t * 4 / 8).round().clamp(min=1).long())


def test_random_schedule_masks_with_probability_t_over_T():
    model = tiny(total_steps=8)
    t = torch.full((20_000,), 3)
    share = model.mask_of(t, StepRandom("m").rand(len(t), 4)).double().mean()
    assert abs(share - 3 / 8) < 4 * math.sqrt(3 / 8 * 5 / 8 / 80_000)


def test_mlm_loss_of_an_empty_mask_is_finite():
    model = tiny(loss_type="mlm")
    out = model.loss(STATES[:3], t=torch.tensor([1, 2, 3]), mask=torch.zeros(3, L, dtype=torch.bool))
    assert out.loss == 0


# ---------------------------------------------------------------------- autoregressive


def test_autoregressive_samples_follow_the_network():
    model = tiny("autoregressive")
    with torch.no_grad():
        model.net.head.weight.mul_(1.5)  # an uneven distribution
        law = (-model.nll(STATES)).double().exp()
    assert abs(law.sum() - 1) < 1e-5
    assert chi_square_p(draws(model, 40_000), law / law.sum()) > 1e-3


def test_cached_decoding_equals_the_whole_forward_pass():
    model = tiny("autoregressive", block_size=12, codebook_size=7).eval()
    ids = torch.randint(0, 7, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.net(ids)
        decoder = CachedDecoder(model.net)
        for i in range(12):
            assert torch.allclose(decoder.next_logits(ids[:, :i]), whole[:, i], atol=1e-5)


def test_causal_network_does_not_look_ahead():
    model = tiny("autoregressive", block_size=6, codebook_size=5).eval()
    a = torch.randint(0, 5, (1, 6), generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0, 3] = (b[0, 3] + 1) % 5
    with torch.no_grad():
        difference = (model.net(a) - model.net(b)).abs().sum(-1)[0]
    assert torch.equal(difference[:4], torch.zeros(4))
    assert (difference[4:] > 0).all()


# ---------------------------------------------------------------------- randomness and pieces


@pytest.mark.parametrize("name,kind", [("absorbing", "diffusion"), ("absorbing", "mlm"), ("autoregressive", "")])
def test_a_sample_does_not_depend_on_its_batch(name, kind):
    model = tiny(name, sample_type=kind, block_size=9, codebook_size=11).eval()
    u = sample_uniforms(3, range(6), model.draws_per_sample())
    together = model.sample(u)
    alone = torch.cat([model.sample(u[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)
    assert together.max() < 11


def test_draw_codes_at_the_edges():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    assert invert_cdf(probs, torch.tensor([0.0])).item() == 1
    assert invert_cdf(probs, torch.tensor([0.5])).item() == 3
    assert invert_cdf(probs, torch.tensor([1.0])).item() == 3  # rounding must not reach an impossible code
    assert draw_codes(torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([0.999]), temp=1e-3).item() == 1


@pytest.mark.parametrize("temp", [1e-37, 1e-30, 1e-6])
def test_the_coldest_draw_is_the_likeliest_code(temp):
    logits = 100 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_codes(logits, torch.rand(50), temp), logits.argmax(1))


@pytest.mark.parametrize("temp", [1e-6, 0.8, 1.0, 1.5])
def test_draws_at_usual_temperatures_are_those_of_the_plain_quotient(temp):
    random = torch.Generator().manual_seed(0)
    logits, u = 3 * torch.randn(20_000, 64, generator=random), torch.rand(20_000, generator=random)
    assert torch.equal(draw_codes(logits, u, temp), invert_cdf((logits / temp).softmax(-1), u))


def order_of(name, u, steps):
    """The order of samples with uniforms u (B, L), all of whose tokens are unknown."""
    model = tiny(block_size=u.shape[1], sample_steps=steps, sample_order=name)
    return model.order_of(u, torch.ones(u.shape, dtype=torch.bool))


def test_events_of_a_sample():
    times = torch.tensor([[5, 9, 5, 1], [2, 2, 2, 2]])
    assert events_of(times).tolist() == [[1, 0, 1, 2], [0, 0, 0, 0]]


def test_times_of_the_orders():
    assert order_of("random", torch.tensor([[0.0, 0.5, 0.999999]]), 3).times().tolist() == [[1, 2, 3]]
    u = torch.rand(2, 6)
    assert order_of("raster", u, 6).times().tolist() == 2 * [[6, 5, 4, 3, 2, 1]]
    assert order_of("raster", u, 3).times().tolist() == 2 * [[3, 3, 2, 2, 1, 1]]
    assert order_of("raster", u, 12).times().tolist() == 2 * [[12, 10, 8, 6, 4, 2]]


@pytest.mark.parametrize("name,kind", [("absorbing", "diffusion"), ("absorbing", "mlm"), ("autoregressive", "")])
@pytest.mark.parametrize("n,batch_size", [(1, 4), (11, 1), (11, 4), (12, 4), (3, 8), (0, 4)])
def test_many_samples_come_in_order_whatever_the_batch(name, kind, n, batch_size):
    model = tiny(name, sample_type=kind, block_size=9, codebook_size=11).eval()
    draw = functools.partial(sample_uniforms, 3, shape=model.draws_per_sample())
    batches = list(model.sample_many(draw, n, batch_size))
    assert [len(b) for b in batches] == [min(batch_size, n - i) for i in range(0, n, batch_size)]
    if n:
        assert torch.equal(torch.cat(batches), model.sample(draw(range(n))))


class MostConfidentFirst(Order):
    """An order that depends on the predictions: at each time the token whose drawn code is the most probable."""

    def reveals(self, t, masked, logits, codes):
        confidence = logits.softmax(-1).gather(-1, codes[..., None])[..., 0].masked_fill(~masked, -1)
        return torch.nn.functional.one_hot(confidence.argmax(1), masked.shape[1]).bool()


def test_an_order_may_depend_on_the_predictions(monkeypatch):
    monkeypatch.setitem(ORDERS, "random", MostConfidentFirst)
    model = tiny(block_size=9, codebook_size=11, sample_steps=9).eval()
    draw = functools.partial(sample_uniforms, 3, shape=model.draws_per_sample())
    seen = []
    hook = model.net.register_forward_pre_hook(lambda net, args: seen.append(args[0].clone()))
    ids = model.sample(draw(range(5)))
    hook.remove()
    assert [(state != model.mask_id).sum(1).tolist() for state in seen] == [[i] * 5 for i in range(9)]
    assert ids.max() < 11 and all(torch.equal(s[s < 11], ids[s < 11]) for s in seen)
    assert torch.equal(torch.cat(list(model.sample_many(draw, 5, 2))), ids)
    shares = model.revealed_at(ids, draw(range(5)))
    for i, state in enumerate(seen):  # before pass i
        assert torch.equal(state != model.mask_id, shares <= i / 9 + 1e-6)
    later = torch.arange(9) > 5  # given the first six tokens, the other three are drawn in three passes
    shares = model.revealed_at(ids, draw(range(5)), unknown=later.expand(5, -1))
    assert (shares[:, :6] == 0).all() and len(shares[0, 6:].unique()) == 3


def test_batches_stay_full():
    model, sizes = tiny(block_size=16, codebook_size=5, sample_steps=16).eval(), []
    model._denoise_fn.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    draw = functools.partial(sample_uniforms, 0, shape=model.draws_per_sample())
    n_events = (events_of(order_of("random", draw(range(100))[:, 0], 16).times()).max(1) + 1).tolist()
    assert len(set(n_events)) > 3
    list(model.sample_many(draw, 100, 10))
    assert sum(sizes) == sum(n_events)
    longest = max(n_events)
    assert sizes[:-longest] == [10] * (len(sizes) - longest) and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", ["absorbing", "autoregressive"])
def test_weights_are_frozen_only_while_sampling(name):
    """Also in bf16, a model in training draws the same samples as its copy and keeps its float32 weights and
    gradients."""
    model = tiny(name, block_size=9, codebook_size=11)
    model.loss(torch.randint(0, 11, (2, 9)), StepRandom("x")).loss.backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    u = sample_uniforms(3, range(6), model.draws_per_sample())
    with torch.autocast("cpu", torch.bfloat16):
        frozen_ids = model.sample(u)
        with mock.patch("models.fast.torch.is_autocast_enabled", lambda device: False):
            assert torch.equal(model.sample(u), frozen_ids)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    assert all(p.grad is None or p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(ZeroDivisionError):
        model.sample(u, temp=1 / 0)
    assert all(m.joined is None for m in model.modules() if hasattr(m, "joined"))


def test_scatter_last_keeps_the_later_of_equal_indices():
    out = scatter_last(torch.zeros(4), torch.tensor([1, 3, 1]), torch.tensor([5.0, 6.0, 7.0]))
    assert out.tolist() == [0, 7, 0, 6]


@pytest.mark.parametrize(("count", "rounded"), [(0, 0), (1, 32), (32, 32), (250, 256), (257, 512), (512, 512)])
def test_positions_are_rounded_up(count, rounded):
    at = torch.arange(count), torch.arange(count) + 1
    rows, cols = rounded_up(at)
    assert len(rows) == len(cols) == rounded
    assert torch.equal(rows[:count], at[0]) and torch.equal(cols[:count], at[1]) and not rows[count:].any()


def test_logits_at_chosen_positions_equal_the_whole():
    model = tiny(block_size=10, codebook_size=6)
    ids = torch.randint(0, 7, (3, 10), generator=torch.Generator().manual_seed(0))
    at = (torch.tensor([0, 2, 2]), torch.tensor([9, 0, 4]))
    with torch.no_grad():
        assert torch.allclose(model._denoise_fn(ids, at), model._denoise_fn(ids)[at], atol=1e-6)
