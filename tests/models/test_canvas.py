"""Images larger than those of training: windows, order, tiles, against definitions written out plainly."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import experiment, run, sampler_flags, train_stage_1, train_stage_2
from test_samplers import STATES, chi_square_p, data_distribution, tiny, with_oracle

from experiments import generate_big_samples as big
from models.canvas import WindowReader, complete_canvas, draws_per_canvas, needed_windows, sample_canvas
from models.samplers.base import invert_cdf
from models.tiles import blend_weights, decode_tiled, tile_starts
from utils.core.errors import UsageError
from utils.core.seed import sample_uniforms

WINDOW, K = (2, 3), 5


class Constant(torch.nn.Module):
    """A sampler that predicts a distribution for each position in the window, whatever it is shown."""

    needs_raster_order = False
    mask_id = codebook_size = K

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.logits = 2 * torch.randn(math.prod(WINDOW), K, generator=random)
        self.shown = []

    def predict(self, ids, rows, cols):
        self.shown.append(ids.clone())
        assert rows.shape == cols.shape and rows.max() < len(ids)
        return self.logits[cols]


def uniforms(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def covering(cell, canvas, window=WINDOW):
    """Corners of all windows that cover a cell, by trying every window."""
    (row, col), (H, W), (h, w) = cell, canvas, window
    corners = itertools.product(range(H - h + 1), range(W - w + 1))
    return [(top, left) for top, left in corners if top <= row < top + h and left <= col < left + w]


def plain_canvas(sampler, u, window, temp):
    """Raster order, one cell a step, one window at a time: the definition."""
    ids = torch.full(u.shape, sampler.mask_id)
    (H, W), (h, w) = u.shape, window
    for row, col in itertools.product(range(H), range(W)):
        seen = []
        for top, left in covering((row, col), (H, W), window):
            view = ids[top : top + h, left : left + w].reshape(1, -1)
            at = torch.tensor([0]), torch.tensor([(row - top) * w + col - left])
            seen.append(sampler.predict(view, *at).double().softmax(-1)[0])
        sharpened = torch.stack(seen).mean(0) ** (1 / temp)
        ids[row, col] = invert_cdf(sharpened, u[row, col])
    return ids


def sharp(sampler, **given):
    """A tiny sampler that looks at its context: an untrained one says the same of everything."""
    model = tiny(sampler, block_size=6, codebook_size=11, **given).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("head.weight", "tok_emb.weight", "pos_emb")):
            torch.nn.init.normal_(weight, std=0.5)
    return model.requires_grad_(False)


# ---------------------------------------------------------------------- the law


@pytest.mark.parametrize("cells_per_step", [1, 4])
def test_each_cell_is_drawn_from_the_sharpened_mean_over_its_windows(cells_per_step):
    sampler, canvas, temp = Constant(), (3, 5), 0.7
    probs = sampler.logits.double().softmax(-1)
    expected = torch.empty(*canvas, K, dtype=torch.float64)
    for row, col in itertools.product(*map(range, canvas)):
        inside = [(row - top) * WINDOW[1] + col - left for top, left in covering((row, col), canvas)]
        sharpened = probs[inside].mean(0) ** (1 / temp)
        expected[row, col] = sharpened / sharpened.sum()
    # Evenly spaced uniforms: the counts follow the law as closely as whole numbers can.
    n = 2000
    u = ((torch.arange(n) + 0.5) / n)[:, None, None].expand(-1, *canvas)
    for order in (None, uniforms(n, *canvas)):
        ids = sample_canvas(sampler, u, WINDOW, temp, 5000, order=order, cells_per_step=cells_per_step)
        shares = torch.stack([(ids == k).double().mean(0) for k in range(K)], -1)
        assert (shares - expected).abs().max() <= 1.01 / n


@pytest.mark.parametrize("name", ["absorbing", "autoregressive"])
@pytest.mark.parametrize("temp", [0.8, 1.2])
def test_the_default_is_the_plain_loop_in_raster_order(name, temp):
    model, u = sharp(name), uniforms(2, 4, 6)
    ids = sample_canvas(model, u, WINDOW, temp)
    assert torch.equal(ids, torch.stack([plain_canvas(model, row, WINDOW, temp) for row in u]))
    assert len(ids.unique()) > 3


def test_the_coldest_and_the_hottest_canvas():
    sampler, n = Constant(), 200
    sampler.logits[:, 0] = -1e4  # of probability 0
    u = uniforms(n, *WINDOW)
    cold = sample_canvas(sampler, u, WINDOW, 1e-37)
    assert torch.equal(cold, sampler.logits.argmax(1).view(WINDOW).expand(n, -1, -1))
    hot = sample_canvas(sampler, u, WINDOW, 1e300)
    assert torch.equal(hot, 1 + (u * (K - 1)).long())


def test_a_cell_sees_the_state_before_its_step_and_only_that():
    sampler = Constant()
    u, order = uniforms(1, 2, 3), torch.tensor([[[0.5, 0.1, 0.9], [0.3, 0.2, 0.7]]])
    ids = sample_canvas(sampler, u, WINDOW, order=order, cells_per_step=2)[0].flatten()
    known = [[], [1, 4], [1, 4, 3, 0]]
    for shown, cells in zip(sampler.shown, known, strict=True):
        state = torch.full((6,), K)
        state[cells] = ids[cells]
        assert torch.equal(shown, state[None])


# ---------------------------------------------------------------------- on one window: the samplers' own


def test_one_window_equals_autoregressive_sampling():
    model, u = sharp("autoregressive"), uniforms(4, 6)
    assert torch.equal(sample_canvas(model, u.view(4, *WINDOW), WINDOW, 0.8).flatten(1), model.sample(u, 0.8))


@pytest.mark.parametrize("random_order,cells_per_step", [(False, 1), (False, 3), (True, 1), (True, 2), (True, 6)])
def test_one_window_equals_absorbing_sampling(random_order, cells_per_step):
    steps = 6 // cells_per_step
    model, u = sharp("absorbing", sample_steps=steps), uniforms(4, 6)
    order = uniforms(4, 6, seed=2) if random_order else torch.arange(6.0).expand(4, 6)
    event = order.argsort(1).argsort(1) // cells_per_step
    reveal = (steps - event - 0.5) / steps  # the time of the first event is the latest, `steps`
    expected = model.sample(torch.stack((reveal, u), 1), 0.8)
    given = dict(order=order.view(4, *WINDOW)) if random_order else {}
    got = sample_canvas(model, u.view(4, *WINDOW), WINDOW, 0.8, cells_per_step=cells_per_step, **given)
    assert torch.equal(got.flatten(1), expected)
    more = dict(temp_end=1.1, top_k=7, top_p=0.9)
    model = sharp("absorbing", sample_steps=steps, **more)
    got = sample_canvas(model, u.view(4, *WINDOW), WINDOW, 0.8, cells_per_step=cells_per_step, **given, **more)
    assert torch.equal(got.flatten(1), model.sample(torch.stack((reveal, u), 1), 0.8))
    assert not torch.equal(got.flatten(1), expected)


# ---------------------------------------------------------------------- all settings of sampling, and given codes


SETTINGS = [
    dict(),
    dict(sample_order="halton", sample_schedule="arccos", sample_steps=3),
    dict(sample_order="raster", sample_steps=6),
    dict(sample_schedule="cosine", temp_end=0.5, top_k=7, top_p=0.9),
    dict(sample_order="confidence"),
    dict(remask_eta=0.5),
    dict(sample_order="halton", sample_schedule="cosine", remask_eta=1.0),
]


def canvas_uniforms(model, n, shape):
    return sample_uniforms(3, range(n), draws_per_canvas(model, shape))


def partly_known(model, shape):
    """Canvases of which nothing, the upper left corner or every third cell is known."""
    known = torch.randint(11, (3, *shape), generator=torch.Generator().manual_seed(2))
    known[0], known[1, 1:], known[1, :, 2:] = 11, 11, 11
    known[2].view(-1)[torch.arange(shape[0] * shape[1]) % 3 > 0] = 11
    return known


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_window_is_completed_as_the_sampler_does(settings):
    model = sharp("absorbing", latent_shape=[1, *WINDOW], **settings)
    known, u = partly_known(model, WINDOW).repeat(10, 1, 1), canvas_uniforms(model, 30, WINDOW)
    ids = complete_canvas(model, known, u, WINDOW, 0.9)
    assert torch.equal(ids.flatten(1), model.complete(known.flatten(1), u, 0.9))
    assert len(ids.unique()) > 5


def plain_logits(model, shape):
    """Predict all cells (B, H*W), one window at a time: (B, H*W, K)."""

    def net(ids):
        logits = torch.zeros(*ids.shape, 11)
        for b, cell in itertools.product(range(len(ids)), range(ids.shape[1])):
            row, col = divmod(cell, shape[1])
            seen = []
            for top, left in covering((row, col), shape):
                view = ids[b].view(shape)[top : top + WINDOW[0], left : left + WINDOW[1]].reshape(1, -1)
                seen.append(model.net(view)[0, (row - top) * WINDOW[1] + col - left].double().softmax(-1))
            logits[b, cell] = torch.stack(seen).mean(0).log()
        return logits

    return net


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_larger_canvas_is_completed_by_the_plain_loop(settings):
    model, shape = sharp("absorbing", latent_shape=[1, *WINDOW], **settings), (3, 5)
    known, u = partly_known(model, shape), canvas_uniforms(model, 3, shape)
    before = known.clone()
    ids = complete_canvas(model, known, u, WINDOW, 0.9)
    plainly = model.sample_plainly(u, 0.9, known=known.flatten(1), grid=shape, net=plain_logits(model, shape))
    assert torch.equal(ids.flatten(1), plainly)
    assert torch.equal(known, before) and torch.equal(ids[known < 11], known[known < 11]) and ids.max() < 11
    parts = [complete_canvas(model, known[i : i + 1], u[i : i + 1], WINDOW, 0.9, max_batch=2) for i in range(3)]
    assert torch.equal(torch.cat(parts), ids), "any batch gives the same"


def test_each_step_draws_what_the_schedule_says():
    settings = dict(sample_order="halton", sample_schedule="arccos", sample_steps=4)
    model, shape, seen = sharp("absorbing", latent_shape=[1, *WINDOW], **settings), (4, 4), []
    known = torch.full((1, *shape), 11)
    logits = WindowReader.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowReader, "logits", lambda *args: seen.append(args[3].size) or logits(*args))
        complete_canvas(model, known, canvas_uniforms(model, 1, shape), WINDOW)
    assert seen == [3, 3, 3, 7]  # of 16, see test_schedules


@pytest.mark.parametrize("settings", [dict(sample_order="raster"), dict(sample_order="halton"), dict(sample_steps=999)])
def test_a_continued_picture_has_the_conditional_law(settings):
    """2 x 2 codes are given, and one column is added. Only the window of the last two columns covers the new cells. A
    perfect network draws them from the law of the data's second column given the first."""
    p, n = data_distribution(), 10_000
    model = with_oracle(p, latent_shape=[1, 2, 2], **{"sample_steps": 2, **settings})
    known = torch.tensor([[0, 2, 3], [1, 0, 3]]).repeat(n, 1, 1)
    ids = complete_canvas(model, known, canvas_uniforms(model, n, (2, 3)), (2, 2), max_batch=2 * n)
    assert torch.equal(ids[:, :, :2], known[:, :, :2])
    possible = (STATES[:, 0] == 2) & (STATES[:, 2] == 0)
    law = p * possible / p[possible].sum()
    assert chi_square_p(ids[:, :, 1:].flatten(1), law, possible) > 1e-3


# ---------------------------------------------------------------------- batches, windows, refusals


@pytest.mark.parametrize("random_order,cells_per_step", [(False, 1), (True, 1), (True, 5)])
def test_a_canvas_does_not_depend_on_its_batch(random_order, cells_per_step):
    model, u = sharp("absorbing"), uniforms(3, 4, 5)
    order = uniforms(3, 4, 5, seed=2)

    def draw(chosen, max_batch):
        given = dict(order=order[chosen]) if random_order else {}
        return sample_canvas(model, u[chosen], WINDOW, 0.8, max_batch, cells_per_step=cells_per_step, **given)

    together = draw(slice(None), 256)
    assert together.min() >= 0 and together.max() < 11  # no cell is left out
    assert torch.equal(together, torch.cat([draw(slice(i, i + 1), 256) for i in range(3)]))
    for max_batch in (1, 2, 7):
        assert torch.equal(together, draw(slice(None), max_batch))


def test_needed_windows_are_those_that_cover_each_once():
    canvas, cells = (5, 6), np.array([[0, 7, 8, 29], [14, 15, 20, 3]])
    corners, readings = needed_windows(np.arange(2).repeat(4), cells.ravel(), canvas, WINDOW)
    covers = [(b, covering(divmod(cell, 6), canvas)) for b in range(2) for cell in cells[b].tolist()]
    expected = {(b, *corner) for b, found in covers for corner in found}
    assert len(corners) == len(expected) and set(map(tuple, corners.tolist())) == expected
    pairs = set()
    for cell, number, position in readings.tolist():
        b, c = divmod(cell, 4)
        canvas_number, top, left = corners[number].tolist()
        assert canvas_number == b
        assert (top + position // 3) * 6 + left + position % 3 == cells[b, c]
        pairs.add((cell, top, left))
    assert len(pairs) == len(readings) == sum(len(found) for _, found in covers)
    assert np.diff(readings[:, 1]).min() >= 0


def test_only_covering_windows_are_evaluated_and_none_twice_a_step():
    sampler, (H, W) = Constant(), (4, 7)
    sample_canvas(sampler, uniforms(2, H, W), WINDOW, max_batch=3)
    count = sum(len(covering(cell, (H, W))) for cell in itertools.product(range(H), range(W)))
    assert sum(map(len, sampler.shown)) == 2 * count
    assert max(map(len, sampler.shown)) == 3
    sampler.shown.clear()
    sample_canvas(sampler, uniforms(2, H, W), WINDOW, order=uniforms(2, H, W), cells_per_step=H * W)
    assert sum(map(len, sampler.shown)) == 2 * (H - 1) * (W - 2)  # all cells at once: each window once


def test_refusals():
    for shape in ((1, 1, 6), (1, 2, 2)):
        with pytest.raises(ValueError, match="smaller"):
            sample_canvas(sharp("absorbing"), uniforms(*shape), WINDOW)
        with pytest.raises(ValueError, match="smaller"):
            complete_canvas(sharp("absorbing"), torch.zeros(shape, dtype=torch.int64), uniforms(*shape), WINDOW)
    u = uniforms(1, 3, 4)
    for given in (dict(order=u), dict(cells_per_step=2)):
        with pytest.raises(ValueError, match="raster order, one cell a step"):
            sample_canvas(sharp("autoregressive"), u, WINDOW, **given)


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    "length,tile,overlap", [(8, 8, 4), (5, 8, 4), (9, 8, 4), (13, 8, 4), (40, 8, 4), (40, 8, 0), (33, 8, 7), (3, 1, 0)]
)
def test_tiles_cover_and_their_weights_sum_to_one(length, tile, overlap):
    starts, size = tile_starts(length, tile, overlap), min(tile, length)
    assert starts[0] == 0 and starts[-1] + size == length
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    weights = blend_weights(starts, size, length, scale=4)
    assert torch.allclose(weights.sum(0), torch.ones(4 * length), atol=1e-6)
    for start, weight in zip(starts, weights, strict=True):
        assert weight.min() >= 0
        assert not weight[: 4 * start].any() and not weight[4 * (start + size) :].any()


def nearest(ids):
    """A decoder that is linear and local: each code is 4 x 4 pixels, its value in two channels."""
    return torch.stack((ids, -2 * ids)).float().repeat_interleave(4, 1).repeat_interleave(4, 2)


@pytest.mark.parametrize("shape,tile,overlap", [((13, 21), 8, None), ((4, 20), 8, 2), ((9, 9), 4, 3), ((9, 8), 4, 0)])
def test_tiles_of_a_local_decoder_are_the_whole(shape, tile, overlap):
    ids = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))
    sides = []

    def decode(part):
        sides.append(tuple(part.shape))
        return nearest(part)

    assert torch.allclose(decode_tiled(decode, ids, tile, overlap), nearest(ids), atol=1e-5)
    assert set(sides) == {(min(tile, shape[0]), min(tile, shape[1]))} and len(sides) > 1


def test_what_fits_in_one_tile_is_decoded_at_once():
    ids, pictures = torch.arange(48).view(6, 8), []

    def decode(part):
        pictures.append(torch.randn(3, 4 * part.shape[0], 4 * part.shape[1]))
        return pictures[-1]

    assert torch.equal(decode_tiled(decode, ids, 8), pictures[0]) and len(pictures) == 1


def test_tiles_that_disagree_leave_no_seam():
    """A decoder that shifts each tile as a whole: half of the tiles by 1, or all by what it likes."""
    offsets = itertools.cycle([0.0, 1.0, 1.0, 0.0, 1.0])
    picture = decode_tiled(lambda part: 0 * nearest(part) + next(offsets), torch.zeros(20, 28), 8)
    steps = [picture.diff(dim=d).abs().max() for d in (1, 2)]
    assert picture.max() - picture.min() > 0.9  # the shift is there ...
    assert max(steps) < 0.12  # ... but over the 16 pixels of an overlap, not in one


# ---------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes):
    """A folder with a tiny autoencoder and both samplers, of 4 x 4 codes and 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("big")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_stage_1(shapes, "ae", "--train_steps 3")
        for sampler in ("absorbing", "autoregressive"):
            train_stage_2(shapes, sampler, "ae", 3, "--train_steps 3", sampler=sampler)
    return folder


def flags(shapes, log_dir, more, sampler="absorbing"):
    return sampler_flags(shapes, log_dir, "ae", 3, f"--load_dir {sampler} --load_step 3 {more}", sampler=sampler)


def draw(shapes, log_dir, more, sampler="absorbing"):
    """Run the script in this process; returns the pictures' pixels by file name, and the values reported."""
    big.main(experiment(big, flags(shapes, log_dir, more, sampler)))
    folder = Path("logs", log_dir)
    pictures = {p.name: Image.open(p).copy() for p in sorted((folder / "images").iterdir())}
    return pictures, json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_script_from_the_command_line(trained, shapes):
    more = "--shape 6 9 --order random --cells_per_step 4 --n_samples 2 --window_batch 7 --decode_tile 4"
    text = run("experiments/generate_big_samples.py", flags(shapes, "cli", more), trained)
    assert "6 x 9" in text
    names = sorted(p.name for p in (trained / "logs/cli/images").iterdir())
    assert names == ["big_6x9_0.png", "big_6x9_1.png"]
    for name in names:
        with Image.open(trained / "logs/cli/images" / name) as picture:
            assert picture.size[0] * 6 == picture.size[1] * 9


@pytest.mark.parametrize(
    "sampler,more",
    [
        ("autoregressive", ""),
        ("absorbing", ""),
        ("absorbing", "--order random"),
        ("absorbing", "--sample_order halton --cells_per_step 3"),
        ("absorbing", "--sample_order halton --sample_schedule arccos --sample_steps 9"),
        ("absorbing", "--sample_order confidence --sample_steps 5"),
        ("absorbing", "--order random --remask_eta 0.5 --sample_steps 7"),
    ],
)
def test_script_draws_the_same_whatever_the_batch(trained, shapes, monkeypatch, sampler, more):
    monkeypatch.chdir(trained)
    wanted = f"--shape 5 7 --n_samples 3 {more}"
    name = sampler + more.replace(" ", "").replace("-", "")
    together, row = draw(shapes, f"{name}_together", wanted, sampler)
    apart, _ = draw(shapes, f"{name}_apart", f"{wanted} --batch_size 1 --window_batch 3", sampler)
    assert list(together) == ["big_5x7_0.png", "big_5x7_1.png", "big_5x7_2.png"]
    for file, picture in together.items():
        assert picture.tobytes() == apart[file].tobytes(), file
    assert len({p.tobytes() for p in together.values()}) == 3
    assert row["args"]["temp"] == 0.8
    covered = sum(len(covering(cell, (5, 7), (4, 4))) for cell in itertools.product(range(5), range(7)))
    if "--cells_per_step" not in more and "--sample_steps" not in more:
        assert row["values"]["windows"] == 3 * covered


def test_script_has_two_names_for_the_order(trained, shapes, monkeypatch):
    monkeypatch.chdir(trained)
    drawn = {}
    for words in ("", "--order random", "--sample_order random", "--sample_order halton", "--sample_order raster"):
        pictures, row = draw(shapes, f"order_{len(drawn)}", f"--shape 4 5 --n_samples 1 {words}")
        drawn[words] = pictures["big_4x5_0.png"].tobytes()
        assert row["args"]["order"] == row["args"]["sample_order"] == (words.split() or ["raster"])[-1]
    assert drawn[""] == drawn["--sample_order raster"]
    assert drawn["--order random"] == drawn["--sample_order random"] and len(set(drawn.values())) == 3


def test_script_with_one_window_draws_the_samples(trained, shapes, monkeypatch):
    """A canvas of the size of training, in the steps of get_samples.py: the same codes, up to rounding."""
    monkeypatch.chdir(trained)
    more = "--sample_steps 7 --sample_schedule uniform --temp 0.9 --sample_order"
    for order in ("random", "confidence"):
        H = experiment(big, flags(shapes, "one", f"--shape 4 4 --n_samples 2 {more} {order}"))
        models = big.load_models(H)
        (ids,) = big.draw_canvases(H, models)
        u = sample_uniforms(0, range(2), models.sampler.model.draws_per_sample(), models.device)
        assert torch.equal(ids.flatten(1), models.sampler.model.sample(u, 0.9))


def test_script_crops_the_middle(trained, shapes, monkeypatch):
    monkeypatch.chdir(trained)
    (cropped,) = draw(shapes, "cropped", "--shape 2 6 --crop --n_samples 1")[0].values()
    (whole,) = draw(shapes, "whole", "--shape 4 6 --n_samples 1")[0].values()
    cropped, whole = cropped.resize((24, 8), Image.NEAREST), whole.resize((24, 16), Image.NEAREST)
    assert cropped.tobytes() == whole.crop((0, 4, 24, 12)).tobytes()


def test_script_refuses(trained, shapes, monkeypatch, capsys):
    script = "experiments/generate_big_samples.py"
    text = run(script, flags(shapes, "no", "--shape 6"), trained, code=2)
    assert (
        text.splitlines()[-1]
        == "generate_big_samples.py: error: --shape 6 must be two numbers, rows (height) and then columns (width)"
    )
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit):
        draw(shapes, "no", "--shape 3 6")
    assert "--shape 3 6 is smaller than the training canvas, 4 rows and 4 columns: --crop" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--order raster"):
        draw(shapes, "no", "--shape 5 5 --order random", "autoregressive")
    for words in ("--sample_order confidence", "--sample_schedule uniform", "--remask_eta 0.1"):
        with pytest.raises(SystemExit):
            draw(shapes, "no", f"--shape 6 6 --cells_per_step 2 {words}")
        given = words if "confidence" in words else words.split()[0]
        assert f"--cells_per_step 2 contradicts {given}, with which" in capsys.readouterr().err
    text = run(script, flags(shapes, "no", "--shape 6 6 --order random --sample_order halton"), trained, code=2)
    assert text.splitlines()[-1].endswith("--order random contradicts --sample_order halton: leave one of them out")
