"""Parts of pictures that are redrawn: masks and cells in closed form, the law by enumeration, what must not change."""

import pytest
import torch
from test_orders import GRID, lively
from test_samplers import STATES, K, L, chi_square_p, data_distribution, draws, tiny, with_oracle

from models.editing import blend, distances, hide, random_cells, redraw, touched_cells
from utils.core.errors import UserError
from utils.core.seed import sample_uniforms


def marked(*pixels, size=8):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    for row, column in pixels:
        mask[0, row, column] = True
    return mask


def places(cells):
    return [tuple(place) for place in cells[0].nonzero().tolist()]


def test_the_cells_that_a_mask_touches():
    assert places(touched_cells(marked((3, 4)), (4, 4))) == [(1, 2)]
    assert places(touched_cells(marked((3, 4), (0, 0)), (2, 2))) == [(0, 0), (0, 1)]
    assert places(touched_cells(marked((0, 0)), (4, 4), 1)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert touched_cells(marked((3, 4)), (4, 4), 2).sum() == 16
    assert not touched_cells(marked(), (4, 4), 3).any()


def test_random_cells_are_nested():
    u = torch.tensor([[[0.3, 0.1], [0.9, 0.5]]])
    assert places(random_cells(u, 0.01)) == [(0, 1)]
    assert places(random_cells(u, 0.5)) == [(0, 0), (0, 1)]
    assert random_cells(u, 1.0).all()


def test_hidden_pixels_are_the_nearest_kept_ones():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    mask = torch.tensor([[[0, 0, 1, 1]] * 4], dtype=torch.bool)
    assert hide(x, mask)[0, 0, 2].tolist() == [8, 9, 9, 9]
    assert torch.equal(hide(x, mask), hide(torch.where(mask, torch.rand(4, 4), x), mask))
    both = hide(x.expand(2, -1, -1, -1), torch.cat((mask, ~mask | mask)))
    assert torch.equal(both[:1], hide(x, mask)) and (both[1] == 0.5).all()


def test_blending():
    """From the mask's edge on, the weight falls to 0 in width + 1 pixels."""
    mask = torch.zeros(1, 1, 8, dtype=torch.bool)
    mask[..., :2] = True
    assert distances(mask)[0].flatten().tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    black, white = torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8)
    assert blend(black, white, mask, 3).flatten().tolist() == [1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert blend(black, white, mask, 0).flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    original = torch.rand(1, 3, 1, 8)
    assert torch.equal(blend(original, torch.full_like(original, torch.inf), mask, 2)[..., 4:], original[..., 4:])


GIVEN = torch.tensor([[K, 1, K, K], [2, K, K, 0]])


def law_given(p, tokens):
    fits = ((tokens == STATES) | (tokens == K)).all(1)
    return p * fits / p[fits].sum(), fits


@pytest.mark.parametrize(
    "settings",
    [
        dict(sample_steps=4000),  # two tokens in one step: 0.03% of the samples
        dict(sample_steps=L, sample_order="halton"),
        dict(sample_steps=64, sample_schedule="cosine"),
    ],
)
def test_redrawn_codes_follow_the_conditional_law(settings):
    """Rows with one and two tokens given, in one batch; the codes in the cells have no influence."""
    p, n = data_distribution(), 10_000
    model = with_oracle(p, **settings, **GRID)
    passes = []
    model.net.register_forward_pre_hook(lambda net, args: passes.append(len(args[0])))
    ids = GIVEN.where(GIVEN < K, 1).repeat(n, 1)
    cells = (GIVEN == K).view(-1, 2, 2).repeat(n, 1, 1)
    u = torch.rand(2 * n, *model.draws_per_sample(), generator=torch.Generator().manual_seed(5))
    drawn = redraw(model, ids, cells, u)
    assert len(passes) == 3, "a pass for each code, and none that reveals nothing"
    for row, tokens in enumerate(GIVEN):
        assert torch.equal(drawn[row::2, tokens < K], tokens[tokens < K].expand(n, -1))
        assert chi_square_p(drawn[row::2], *law_given(p, tokens)) > 1e-3


PROCEDURES = [
    dict(),
    dict(sample_order="halton", sample_schedule="arccos"),
    dict(sample_order="confidence"),
    dict(remask_eta=0.5),
    dict(sample_type="mlm"),
    dict(temp_end=0.5, top_k=9),
]


@pytest.mark.parametrize("settings", PROCEDURES, ids=str)
def test_other_codes_never_change(settings):
    model = lively(latent_shape=[1, 4, 4], **settings)
    ids = torch.randint(16, (12, 16), generator=torch.Generator().manual_seed(1))
    u = sample_uniforms(0, range(12), model.draws_per_sample())
    cells = torch.stack([random_cells(torch.rand(1, 4, 4), share)[0] for share in torch.linspace(0.1, 1, 12).tolist()])
    drawn = redraw(model, ids, cells, u)
    assert torch.equal(drawn[~cells.flatten(1)], ids[~cells.flatten(1)]) and drawn.max() < 16
    assert (drawn != ids).sum() > cells.sum() / 2
    parts = [redraw(model, *(x[i : i + 5] for x in (ids, cells, u))) for i in range(0, 12, 5)]
    assert torch.equal(torch.cat(parts), drawn), "any batch gives the same"
    if settings.get("sample_type") != "mlm":
        plain = model.sample_plainly(u, known=ids.masked_fill(cells.flatten(1), 16))
        assert torch.equal(plain, drawn)
    with pytest.raises(ValueError, match="no code to redraw"):
        redraw(model, ids, cells & False, u)


def test_all_codes_redrawn_are_a_sample():
    model = lively(latent_shape=[1, 4, 4])
    u = sample_uniforms(0, range(4), model.draws_per_sample())
    ids = torch.zeros(4, 16, dtype=torch.int64)
    assert torch.equal(redraw(model, ids, torch.ones(4, 4, 4, dtype=torch.bool), u), model.sample(u))


def test_the_autoregressive_sampler_continues_only():
    model = lively("autoregressive")
    u = sample_uniforms(0, range(3), model.draws_per_sample())
    sample = model.sample(u)
    ids, cells = sample.clone(), torch.zeros(3, 4, 4, dtype=torch.bool)
    cells[0, 2:], cells[1, 3, 3], cells[2] = True, True, True
    ids[cells.flatten(1)] = 7
    assert torch.equal(redraw(model, ids, cells, u), sample), "given its beginning, the rest is the same sample"
    ids[0, :8] = (ids[0, :8] + 5) % 16
    assert not torch.equal(redraw(model, ids, cells, u)[0, 8:], sample[0, 8:])
    with pytest.raises(UserError, match="after all kept codes"):
        redraw(model, ids, cells.flip(1), u)


def test_the_autoregressive_law_given_a_beginning():
    model, n = tiny("autoregressive").eval(), 10_000
    with torch.no_grad():
        model.net.pos_emb.normal_(generator=torch.Generator().manual_seed(2))
    cells = torch.tensor([[[False, False], [True, True]]]).expand(n, -1, -1)
    u = torch.rand(n, L, generator=torch.Generator().manual_seed(3))
    drawn = redraw(model, torch.tensor([[2, 0, 1, 1]]).expand(n, -1), cells, u)
    with torch.no_grad():
        p = (-model.nll(STATES)).exp().double()
    assert chi_square_p(drawn, *law_given(p, torch.tensor([2, 0, K, K]))) > 1e-3
    assert len(draws(model, 5)) == 5


def test_when_the_codes_are_revealed():
    model = lively(latent_shape=[1, 4, 4], sample_order="raster")
    u = sample_uniforms(0, range(1), model.draws_per_sample())
    unknown = torch.arange(16)[None] >= 11
    shares = model.revealed_at(torch.zeros_like(unknown, dtype=torch.int64), u, unknown=unknown)[0]
    assert shares.tolist() == pytest.approx([0] * 11 + [0.05, 0.25, 0.45, 0.65, 0.85])  # of 20 steps
