"""Orders and schedules of sampling: exact laws by enumeration, the number of tokens of each pass, the plain loop."""

import functools
import itertools
import math

import numpy as np
import plain
import pytest
import torch
from test_samplers import (
    STATES,
    K,
    L,
    Oracle,
    chi_square_p,
    conditional,
    data_distribution,
    draws,
    lively,
    with_oracle,
)

from hparams import config
from models.samplers.absorbing import FLAGS
from models.samplers.base import truncated
from models.samplers.orders import ORDERS, KnownOrder
from models.samplers.orders.confidence import NOISE
from models.samplers.orders.halton import halton_ranks, sequence_ranks
from models.samplers.schedules import MASKED, Pace
from utils.core.seed import sample_uniforms

KNOWN = sorted(name for name, order in ORDERS.items() if issubclass(order, KnownOrder))
GRID = dict(latent_shape=[1, 2, 2])  # of the L = 4 tokens of the oracle


def test_the_flags_name_what_there_is():
    assert list(config.ORDERS) == sorted(ORDERS) and list(MASKED) == FLAGS["sample_schedule"]["choices"]


# ---------------------------------------------------------------------- schedules


def test_schedules():
    """n - floor(n masked(r)) for r = 0, 1/4, ... 1: cos(pi r / 2) = 0.924, 0.707, 0.383; (2 / pi) arccos(r) = 0.839,
    0.667, 0.460."""
    known = {name: Pace(4, name).known(16).tolist() for name in MASKED}
    assert known == dict(uniform=[0, 4, 8, 12, 16], cosine=[0, 2, 5, 10, 16], arccos=[0, 3, 6, 9, 16])
    assert Pace(3, "uniform").known(2).tolist() == [0, 1, 2, 2]
    assert Pace(3, "cosine").times(6).tolist() == [3, 2, 2, 1, 1, 1]  # cos(pi / 3) = 1/2, in spite of rounding


@pytest.mark.parametrize("steps", [1, 3, 7, 16, 1000])
@pytest.mark.parametrize("schedule", MASKED)
def test_every_schedule_reveals_each_token_once(schedule, steps):
    for n in (0, 1, 16, 256):
        known = Pace(steps, schedule).known(n)
        assert known[0] == 0 and known[-1] == n and (np.diff(known) >= 0).all()
        times = Pace(steps, schedule).times(n)
        assert np.bincount(steps - times, minlength=steps).tolist() == np.diff(known).tolist()


@pytest.mark.parametrize("steps", [3, 16, 40])
@pytest.mark.parametrize("schedule", MASKED)
@pytest.mark.parametrize("name", sorted(ORDERS))
def test_each_pass_reveals_what_the_schedule_says(name, schedule, steps):
    if (name, schedule) == ("random", "uniform"):
        pytest.skip("independent times: their law is tested")
    model = lively(sample_order=name, sample_schedule=schedule, latent_shape=[1, 4, 4])
    model.S = steps
    states = []
    hook = model.net.register_forward_pre_hook(lambda net, args: states.append(args[0].clone()))
    states.append(model.sample_plainly(torch.rand(5, *model.draws_per_sample())))  # after those of the passes
    hook.remove()
    known = np.unique(Pace(steps, schedule).known(16))  # passes that reveal nothing are skipped
    assert [(ids < 16).sum(1).tolist() for ids in states] == [[n] * 5 for n in known]


# ---------------------------------------------------------------------- laws


def law_of(p, event_lists):
    """The mean law of sampling with the oracle over equally likely lists of events, each a list of tokens that are
    revealed together."""
    law = torch.zeros(len(STATES), dtype=torch.float64)
    for events in event_lists:
        masked, probability = torch.ones(L, dtype=torch.bool), torch.ones(len(STATES), dtype=torch.float64)
        for tokens in events:
            revealed = torch.zeros(L, dtype=torch.bool).index_fill_(0, torch.tensor(tokens), True)
            probability *= conditional(p, STATES, masked, revealed)
            masked = masked & ~revealed
        law += probability / len(event_lists)
    return law


def sequences(name):
    """All sequences of tokens that an order has, equally likely."""
    if name == "random":
        return list(itertools.permutations(range(L)))
    if name == "raster":
        return [tuple(range(L))]
    cells = sequence_ranks(2, 2)
    return [tuple(np.roll(cells, shift, (0, 1)).ravel().argsort()) for shift in itertools.product(range(2), repeat=2)]


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
@pytest.mark.parametrize("name", KNOWN)
def test_the_law_is_that_of_enumeration(name, schedule):
    p, steps = data_distribution(), 2
    known = Pace(steps, schedule).known(L)
    events = [[sequence[a:b] for a, b in itertools.pairwise(known)] for sequence in sequences(name)]
    model = with_oracle(p, sample_steps=steps, sample_order=name, sample_schedule=schedule, **GRID)
    ids = draws(model, 40_000)
    assert chi_square_p(ids, law_of(p, events)) > 1e-3
    assert chi_square_p(ids, p) < 1e-6  # the test is able to fail: some tokens are drawn together


@pytest.mark.parametrize("name", ["halton", "raster"])
def test_one_token_a_pass_has_the_law_of_the_data(name):
    p = data_distribution()
    assert chi_square_p(draws(with_oracle(p, sample_steps=L, sample_order=name, **GRID), 40_000), p) > 1e-3


@pytest.mark.parametrize("name", sorted(ORDERS.keys() - {"confidence"}))
def test_the_law_given_tokens_is_the_conditional_one(name):
    """Rows with one, two and all tokens given in one batch."""
    p, n, steps = data_distribution(), 20_000, 64
    assert np.diff(Pace(steps, "cosine").known(L)).max() == 1  # one token a pass
    model = with_oracle(p, sample_steps=steps, sample_order=name, sample_schedule="cosine", **GRID)
    given = torch.tensor([[K, 1, K, K], [2, K, K, 0], [0, 1, 2, 0]])
    u = torch.rand(3 * n, 2, L, generator=torch.Generator().manual_seed(5))
    ids = model.sample_plainly(u, known=given.repeat(n, 1))
    for row, tokens in enumerate(given):
        fits = ((tokens == STATES) | (tokens == K)).all(1)
        drawn = ids[row::3]
        assert torch.equal(drawn[:, tokens < K], tokens[tokens < K].expand(n, -1))
        assert (tokens < K).all() or chi_square_p(drawn, p * fits / p[fits].sum(), fits) > 1e-3


PARTLY = torch.tensor(list(itertools.product(range(K + 1), repeat=L)))  # (256, 4): K where a token is masked


def subsets(tokens, number, probability):
    """[(subset, its probability)]: all of `number` tokens, equally likely; None: each token with this probability."""
    if number is not None:
        found = list(itertools.combinations(tokens, number))
        return [(subset, 1 / len(found)) for subset in found]
    q, n = probability, len(tokens)
    return [(s, q**m * (1 - q) ** (n - m)) for m in range(n + 1) for s in itertools.combinations(tokens, m)]


def law_with_remasking(p, steps, eta, schedule):
    """The exact law over STATES of random order with remasking, by enumeration of all paths."""
    law = (PARTLY == K).all(1).double()
    pace = Pace(steps, schedule, eta)
    for t in range(steps, 0, -1):
        reveal = remask = None
        if schedule != "uniform":
            remask = pace.remasked(L)[steps - t]
            reveal = np.diff(pace.known(L))[steps - t] + remask
        a_t, a_s = 1 - t / steps, 1 - (t - 1) / steps
        sigma = eta * min(1, (1 - a_s) / a_t) if a_t else 0
        unmask = (a_s - (1 - sigma) * a_t) / (1 - a_t)
        following = torch.zeros(len(PARTLY), dtype=torch.float64)
        for z, weight in zip(PARTLY[law > 0], law[law > 0], strict=True):
            probs = torch.nn.functional.pad(Oracle(p)(z[None])[0].exp(), (0, 1))  # (L, K + 1), K: masked
            kept = torch.nn.functional.one_hot(z, K + 1).double()
            masked, drawn = (z == K).nonzero().flatten().tolist(), (z < K).nonzero().flatten().tolist()
            for shown, q in subsets(masked, reveal, unmask):
                for hidden, r in subsets(drawn, remask, sigma):
                    of_token = kept.clone()
                    of_token[list(shown)] = probs[list(shown)]
                    of_token[list(hidden)] = torch.eye(K + 1, dtype=torch.float64)[K]
                    following += weight * q * r * of_token.gather(1, PARTLY.T).prod(0)
        law = following
    return law[(PARTLY < K).all(1)]


@pytest.mark.parametrize("steps,schedule", [(3, "uniform"), (4, "cosine")])
def test_the_law_with_remasking(steps, schedule):
    p = data_distribution()
    law = law_with_remasking(p, steps, 1.0, schedule)
    assert abs(law.sum() - 1) < 1e-9
    model = with_oracle(p, sample_steps=steps, sample_schedule=schedule, remask_eta=1.0)
    assert chi_square_p(draws(model, 40_000), law) > 1e-3
    # The test is able to fail: without remasking the law is another.
    assert chi_square_p(draws(with_oracle(p, sample_steps=steps, sample_schedule=schedule), 40_000), law) < 1e-6


def test_the_numbers_of_remasked_tokens():
    """floor of the running sum of eta min(known before, unknown after)."""
    assert Pace(4, "uniform", 1.0).remasked(16).tolist() == [0, 4, 4, 0]
    assert Pace(4, "uniform", 0.3).remasked(16).tolist() == [0, 1, 1, 0]  # 1.2, 2.4
    assert Pace(8, "uniform", 0.3).remasked(8).tolist() == [0, 0, 0, 1, 1, 1, 0, 0]  # 0.3, 0.9, 1.8, 2.7, 3.3, 3.6


EXACT = [
    (name, schedule) for name in sorted(ORDERS) for schedule in MASKED if (name, schedule) != ("random", "uniform")
]


@pytest.mark.parametrize("name,schedule", EXACT)
def test_remasking_leaves_as_many_known_as_the_schedule_says(name, schedule):
    model = lively(sample_order=name, sample_schedule=schedule, remask_eta=0.7, latent_shape=[1, 4, 4])
    model.S, states, given = 6, [], torch.full((5, 16), 16)
    given[:, 3] = 2
    hook = model.net.register_forward_pre_hook(lambda net, args: states.append(args[0].clone()))
    states.append(model.sample_plainly(torch.rand(5, *model.draws_per_sample()), known=given))
    hook.remove()
    pace = Pace(6, schedule, 0.7)
    assert [(ids < 16).sum(1).tolist() for ids in states] == [[n + 1] * 5 for n in pace.known(15)]
    for before, after, number in zip(states, states[1:], pace.remasked(15), strict=False):
        assert ((before < 16) & (after == 16)).sum(1).tolist() == [number] * 5
    assert all((ids[:, 3] == 2).all() for ids in states)


def test_the_law_of_the_confidence_order():
    """Two tokens, then the other two. The first are those of a Plackett-Luce law: Gumbel noise with the factor c
    chooses tokens in proportion to p(code)^(1/c). Each pass draws new codes."""
    p, c = data_distribution(), NOISE / 2
    nothing, everything = torch.zeros(L, dtype=torch.bool), torch.ones(L, dtype=torch.bool)
    alone = [conditional(p, STATES, everything, nothing.index_fill(0, torch.tensor([i]), True)) for i in range(L)]
    marginals = torch.stack(alone, 1)  # (81, L): of each state's codes
    weights = marginals ** (1 / c)
    law = torch.zeros(len(STATES), dtype=torch.float64)
    for i, j in itertools.combinations(range(L), 2):
        total = weights.sum(1)
        first = sum(weights[:, a] / total * weights[:, b] / (total - weights[:, a]) for a, b in ((i, j), (j, i)))
        both = marginals.prod(1) * first  # that the codes of the state are drawn, and i and j are chosen
        chosen = nothing.index_fill(0, torch.tensor([i, j]), True)
        pair = K * STATES[:, i] + STATES[:, j]
        of_pair = torch.zeros(K * K, dtype=torch.float64).index_add(0, pair, both)
        law += of_pair[pair] * conditional(p, STATES, ~chosen, ~chosen)
    assert abs(law.sum() - 1) < 1e-9
    model = with_oracle(p, sample_steps=2, sample_order="confidence", **GRID)
    ids = draws(model, 40_000)
    assert chi_square_p(ids, law) > 1e-3
    # The test is able to fail: random order.
    assert chi_square_p(draws(with_oracle(p, sample_steps=2, sample_schedule="cosine"), 40_000), law) < 1e-6


def test_confidence_is_the_logarithm_of_the_probability():
    u, logits, codes = torch.full((1, 4, 3), 0.5), torch.tensor([[[0.0, 1], [0, 2], [3, 0]]]), torch.tensor([[0, 1, 1]])
    order = ORDERS["confidence"](u, Pace(4), torch.ones(1, 3, dtype=torch.bool), (1, 3))
    log_p = -torch.tensor([math.log1p(math.exp(x)) for x in (1, -2, 3)])
    for t in (4, 1):
        expected = -(log_p - 4.5 * (t - 1) / 4 * math.log(math.log(2)))
        assert torch.allclose(order.scores(t, logits, codes), expected[None])
    order.u = torch.zeros(1, 4, 3)
    assert order.scores(4, logits, codes).isfinite().all()


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", sorted(ORDERS))
def test_a_sample_does_not_depend_on_its_batch(name, eta):
    model = lively(sample_order=name, sample_schedule="cosine", remask_eta=eta, latent_shape=[1, 4, 4])
    draw = functools.partial(sample_uniforms, 3, shape=model.draws_per_sample())
    expected = model.sample(draw(range(60)))
    assert len(expected.unique()) > 9
    for batch_size in (1, 7):
        assert torch.equal(torch.cat(list(model.sample_many(draw, 60, batch_size))), expected)


# ---------------------------------------------------------------------- the fast form


@pytest.mark.parametrize("steps", [3, 16, 40])
@pytest.mark.parametrize("schedule", MASKED)
@pytest.mark.parametrize("name", KNOWN)
def test_the_fast_form_equals_the_plain_loop(name, schedule, steps):
    model = lively(sample_order=name, sample_schedule=schedule, latent_shape=[1, 4, 4])
    model.S = steps
    draw = functools.partial(sample_uniforms, 3, shape=model.draws_per_sample())
    expected = plain.sample_diffusion(model, draw(range(20)), 0.7)
    assert len(expected.unique()) > 9
    assert torch.equal(torch.cat(list(model.sample_many(draw, 20, 6, 0.7))), expected)
    assert torch.equal(torch.cat(list(model.sample_many(draw, 20, 1, 0.7))), expected)


@pytest.mark.parametrize("more", [dict(temp_end=1.2), dict(temp_end=0.3, top_k=9, top_p=0.8)])
def test_the_fast_form_draws_as_the_plain_loop_does(more):
    for name in KNOWN:
        model = lively(sample_order=name, latent_shape=[1, 4, 4], **more)
        u = torch.rand(20, *model.draws_per_sample(), generator=torch.Generator().manual_seed(1))
        ids = model.sample(u, 0.7)
        assert torch.equal(ids, plain.sample_diffusion(model, u, 0.7))
        assert not torch.equal(ids, lively(sample_order=name, latent_shape=[1, 4, 4]).sample(u, 0.7))


# ---------------------------------------------------------------------- temperature and truncation


def test_truncation_by_its_closed_form():
    probs = torch.tensor([0.125, 0.5, 0.25, 0.125])

    def kept(top_k, top_p):
        return truncated(probs, top_k, top_p).nonzero().flatten().tolist()

    assert [kept(k, 1.0) for k in (0, 1, 2, 3, 4, 9)] == [[0, 1, 2, 3], [1], [1, 2], [0, 1, 2], *[[0, 1, 2, 3]] * 2]
    assert [kept(0, p) for p in (1e-300, 0.5, 0.51, 0.75, 0.76, 0.9)] == [
        *([1], [1], [1, 2], [1, 2]),
        *([0, 1, 2], [0, 1, 2, 3]),
    ]
    assert kept(2, 0.6) == [1] and kept(2, 0.7) == [1, 2]  # 0.5 is 2/3 of the two


def test_truncation_keeps_the_fewest_codes_that_have_the_probability():
    probs = (2 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0))).softmax(1)
    found = truncated(probs, 0, 0.7)
    kept = found > 0
    assert torch.equal(found[kept], probs[kept]) and (found.sum(1) >= 0.7 - 1e-6).all()
    least = found.masked_fill(~kept, 2).amin(1)
    assert (least >= probs.masked_fill(kept, 0).amax(1)).all() and (found.sum(1) - least < 0.7 + 1e-6).all()


@pytest.mark.parametrize("name,kind", [("absorbing", "diffusion"), ("absorbing", "mlm"), ("autoregressive", "")])
def test_one_code_is_the_likeliest(name, kind):
    model = lively(name, sample_type=kind, top_k=1)
    u = torch.rand(20, *model.draws_per_sample(), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.sample(u), lively(name, sample_type=kind).sample(u, 1e-37))


def test_the_law_of_changing_temperatures_and_truncation():
    """In raster order, one token a pass: the product of each token's tempered and truncated law."""
    p, temps = data_distribution(), [1.5, 1.2, 0.9, 0.6]
    law = torch.ones(len(STATES), dtype=torch.float64)
    for i, temp in enumerate(temps):
        before = STATES.masked_fill(torch.arange(L) >= i, K)
        probs = (Oracle(p)(before)[:, i] / temp).softmax(-1)
        probs[torch.arange(len(STATES)), probs.argmin(1)] = 0
        law *= (probs / probs.sum(1, keepdim=True)).gather(1, STATES[:, i : i + 1]).squeeze(1)
    assert abs(law.sum() - 1) < 1e-9
    model = with_oracle(p, sample_steps=L, sample_order="raster", temp_end=temps[-1], top_k=2)
    assert chi_square_p(draws(model, 40_000, temp=temps[0]), law, law > 0) > 1e-3


# ---------------------------------------------------------------------- halton


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (16, 16), (2, 60)])
def test_halton_visits_each_cell_once(grid):
    ranks = sequence_ranks(*grid)
    assert sorted(ranks.ravel().tolist()) == list(range(ranks.size))


def test_halton_is_spread():
    """Any 6 points in succession are in different boxes of 1/2 by 1/3."""
    rows, columns = np.unravel_index(sequence_ranks(16, 27).ravel().argsort()[:6], (16, 27))
    assert len(set(zip(rows // 8, columns // 9, strict=True))) == 6


def test_halton_shifts_on_the_torus():
    u = torch.rand(50, 15, generator=torch.Generator().manual_seed(0))
    ranks = halton_ranks(u, (3, 5)).view(-1, 3, 5)
    shifts = {}
    for row, found in zip(u, ranks, strict=True):
        down, right = int(row[0] * 3), int(row[-1] * 5)
        assert np.array_equal(found.numpy(), np.roll(sequence_ranks(3, 5), (down, right), (0, 1)))
        shifts[down, right] = True
    assert len(shifts) > 10
