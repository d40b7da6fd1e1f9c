"""The nearest training images: equal to LPIPS called pair by pair, for any source of images; the script end to end."""

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from conftest import draw_shapes
from PIL import Image
from plain import lpips_distances
from scripts import experiment, sampler_flags, train_stage_1, train_stage_2

from experiments import calc_nearest_neighbours as script
from experiments.common.efficientnet import load_distance
from experiments.common.weights import load_lpips
from utils.core.errors import UserError, run_main
from utils.core.files import load_tensors, save_tensors
from utils.evaluation.neighbours import (
    MIN_SIDE,
    SPARE,
    NearestK,
    QueryDistances,
    find_candidates,
    lpips_input,
    lpips_of_pairs,
    nearest_of,
)

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file like torchvision's, with random weights; without the classifier, which is 230 MB."""
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).features.state_dict()
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    save_tensors(path, {f"features.{k}": v for k, v in state.items()})
    return path


@pytest.fixture(scope="module")
def model(alexnet):
    return load_lpips("alex", alexnet)


@pytest.fixture(scope="module")
def pictures():
    """30 images (30, 3, 32, 32): 3, 7 and 20 are equal, 11 and 12 nearly so, and 25 but for its mirror image."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(30, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    x[[7, 20]] = x[3].clone()
    for i, size in ((11, 1e-4), (12, 2e-4)):
        x[i] = (x[3] + size * torch.randn(x[3].shape, generator=generator)).clamp(0, 1)
    x[25] = x[3].flip(-1)
    return x


def search(model, queries, pictures, k, order, batch_size):
    """The two passes, over pictures that come in this order."""
    batches = ((pictures[numbers], numbers) for numbers in torch.as_tensor(order).split(batch_size))
    found = find_candidates(model, queries, batches, k)
    assert found.shape == (len(queries), min(k + SPARE, len(pictures)))
    return [nearest_of(model, q, near, lambda i: pictures[i], k) for q, near in zip(queries, found.tolist())]


# ---------------------------------------------------------------------- arithmetic


def test_neighbours_are_those_of_lpips_called_pair_by_pair(model, pictures):
    queries = torch.cat((pictures[[3, 12]], torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))))
    expected = lpips_distances(model, queries, pictures)
    wanted = [sorted(zip(row, range(30)))[:10] for row in expected.tolist()]
    found = search(model, queries, pictures, 10, range(30), 8)
    assert [[i for _, i in row] for row in found] == [[i for _, i in row] for row in wanted]
    for row, other in zip(found, wanted):
        assert [d for d, _ in row] == pytest.approx([d for d, _ in other], abs=1e-6)
    assert found[0][:3] == [(0.0, 3), (0.0, 7), (0.0, 20)]
    assert [i for _, i in found[0][3:5]] == [11, 12]
    assert found[1][0] == (0.0, 12)
    assert (QueryDistances(model, queries)(pictures) - expected).abs().max() < 1e-6


def test_neighbours_by_another_network(pictures):
    distance, queries = load_distance(), pictures[[3, 12]]
    with torch.no_grad():
        expected = torch.stack([distance(query.expand_as(pictures), pictures).flatten() for query in queries])
    found = search(distance, queries, pictures, 5, range(30), 8)
    for row, values in zip(found, expected):
        assert [d for d, _ in row] == pytest.approx(values.sort().values[:5].tolist(), abs=1e-5)
    assert found[0][:3] == [(0.0, 3), (0.0, 7), (0.0, 20)] and found[1][0] == (0.0, 12)


def test_neither_the_batches_nor_their_order_matter(model, pictures):
    queries = pictures[[3, 12, 0]].flip(2)
    results = [
        search(model, queries, pictures, 4, order, size)
        for order, size in [(range(30), 30), (range(30), 7), (range(29, -1, -1), 4), (torch.randperm(30), 1)]
    ]
    assert all(result == results[0] for result in results)
    assert [len(row) for row in results[0]] == [4, 4, 4]


def test_fewer_images_than_neighbours(model, pictures):
    (row,) = search(model, pictures[:1], pictures[:5], 10, range(5), 2)
    assert sorted(i for _, i in row) == [0, 1, 2, 3, 4] and row[0] == (0.0, 0)


def test_what_is_kept_is_bounded_and_the_best():
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 400, (3, 1000), generator=generator).float()  # of 1000 among 400: with many ties
    found = NearestK(3, 5)
    for numbers in torch.randperm(1000, generator=generator).split(64):
        found.update(distances[:, numbers], numbers)
        assert found.distances.shape == found.indices.shape and found.indices.shape[1] <= 5 + SPARE
    for row, indices, values in zip(distances.tolist(), found.indices.tolist(), found.distances.tolist()):
        assert list(zip(values, indices)) == sorted(zip(row, range(1000)))[: 5 + SPARE]


def test_heads_with_negative_weights(alexnet, pictures):
    model = load_lpips("alex", alexnet)
    with torch.no_grad():
        model.lins[1].model[-1].weight[:, ::2] *= -9
    pictures = pictures[:12]
    expected = lpips_distances(model, pictures[:2], pictures)
    assert expected.min() < 0  # else nothing is tested
    assert (QueryDistances(model, pictures[:2])(pictures) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("side", "channels"), [(4, 3), (16, 1), (30, 3), (31, 1), (40, 3)])
def test_small_and_grey_images(model, side, channels):
    x = torch.rand(5, channels, side, side, generator=torch.Generator().manual_seed(side))
    seen = lpips_input(x)
    factor = seen.shape[2] // side
    assert seen.shape == (5, 3, factor * side, factor * side)
    assert factor * side >= MIN_SIDE and (factor == 1 or (factor - 1) * side < MIN_SIDE)
    assert torch.equal(seen[:, :, ::factor, ::factor], 2 * x.expand(-1, 3, -1, -1) - 1)
    with torch.no_grad():
        expected = [[model(a[None], b[None]).item() for b in seen] for a in seen[:2]]
    assert lpips_of_pairs(model, x[1], x) == pytest.approx(expected[1], abs=1e-7)
    assert (QueryDistances(model, x[:2])(x) - torch.tensor(expected)).abs().max() < 1e-6


def test_no_smaller_image_fits_the_network(model):
    with pytest.raises(RuntimeError, match="too small"):
        model.net(torch.zeros(1, 3, MIN_SIDE - 1, MIN_SIDE - 1))


# ---------------------------------------------------------------------- weights


def test_alexnet_weights_from_torchvisions_place_or_a_whole_lpips(alexnet, model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints" / ALEXNET_FILE
    with pytest.raises(UserError) as error:
        load_lpips("alex")
    assert str(place) in str(error.value) and "--alexnet_weights PATH" in str(error.value)
    place.parent.mkdir(parents=True)
    shutil.copy(alexnet, place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = load_lpips("alex").state_dict()
    assert torch.equal(state["net.slice5.10.weight"], model.state_dict()["net.slice5.10.weight"])
    heads = load_tensors(Path(lpips.__file__).parent / "weights/v0.1/alex.pth")
    assert len(heads) == 5 and all(torch.equal(state[k], v) for k, v in heads.items())
    state["lin2.model.1.weight"] = state["lins.2.model.1.weight"] = torch.full((1, 384, 1, 1), 0.5)
    save_tensors(tmp_path / "whole.pth", state)
    assert load_lpips("alex", tmp_path / "whole.pth").lin2.model[1].weight.unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "does not fit"),
        (torch.zeros(2), "holds no state dict"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, value, named):
    save_tensors(tmp_path / "other.pth", value)
    with pytest.raises(UserError, match=f"other.pth.*{named}"):
        load_lpips("alex", tmp_path / "other.pth")


# ---------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A folder with tiny models of both samplers."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_stage_1(shapes, "ae", "--train_steps 2")
        for sampler in ("absorbing", "autoregressive"):
            train_stage_2(shapes, sampler, "ae", 2, "--train_steps 2", sampler=sampler)
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    shutil.rmtree("logs/nn", ignore_errors=True)
    return trained


def flags_of(images, alexnet, more="", sampler="absorbing"):
    flags = sampler_flags(images, "nn", "ae", 2, more, sampler=sampler)
    return [*flags, "--alexnet_weights", str(alexnet)]


def call(*args, **kw):
    """The script in this process. Returns the JSON that it wrote."""
    script.main(experiment(script, flags_of(*args, **kw)))
    return json.loads(Path("logs/nn/nearest_neighbours.json").read_text())


def test_another_network_needs_no_file(here, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    more = "--load_dir absorbing --load_step 2 --n_samples 2 --n_neighbours 3"
    flags = sampler_flags(shapes, "nn", "ae", 2, more)
    with pytest.raises(UserError, match="needs no download: --net efficientnet_lite0"):
        script.main(experiment(script, flags))
    script.main(experiment(script, [*flags, "--net", "efficientnet_lite0"]))
    row = json.loads(Path("logs/nn/metrics.jsonl").read_text())
    assert 0 < row["values"]["minimum"] < 4 and "efficientnet_lite0" in row and "lpips" not in row
    assert "distance by efficientnet_lite0 to the nearest training image" in capsys.readouterr().out


def last_line(capsys):
    """What went wrong: one line on stderr, after the notes on flags without effect."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    return line


def refused(capsys, *args):
    """The one line of a call that fails; nothing was written."""
    with pytest.raises(SystemExit) as stop:
        run_main(call, *args)
    assert stop.value.code == 1 and not Path("logs/nn").exists()
    return last_line(capsys)


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_neighbours_of_samples(here, shapes, alexnet, sampler):
    load = f"--load_dir {sampler} --load_step 2"
    found = call(shapes, alexnet, f"{load} --n_samples 3 --n_neighbours 4", sampler=sampler)
    assert [entry["query"] for entry in found] == [0, 1, 2]
    for entry in found:
        near = entry["neighbours"]
        assert len({n["index"] for n in near}) == 4
        assert all(Path(n["name"]) == sorted(shapes.iterdir())[n["index"]] for n in near)
        distances = [n["distance"] for n in near]
        assert distances == sorted(distances) and distances[0] > 0
    with Image.open("logs/nn/images/nearest_neighbours.png") as picture:
        cell, gap = 96 + 2, (96 + 4) // 4
        assert picture.size == (5 * cell + 4 + gap, 3 * cell + 2)
        assert picture.crop((cell + 2, 0, cell + 2 + gap, picture.height)).getextrema() == ((255, 255),) * 3
    row = json.loads(Path("logs/nn/metrics.jsonl").read_text())
    nearest = sorted(entry["neighbours"][0]["distance"] for entry in found)
    assert row["values"] == dict(median=nearest[1], minimum=nearest[0], queries=3, training_images=40)
    assert row["metric"] == "calc_nearest_neighbours" and set(row["checkpoints"]) == {"autoencoder", "sampler"}
    more = "--n_samples 2 --n_neighbours 100 --batch_size 3 --query_batch 1"
    again = call(shapes, alexnet, f"{load} {more}", sampler=sampler)
    assert [entry["neighbours"][:4] for entry in again] == [entry["neighbours"] for entry in found[:2]]
    assert [len(entry["neighbours"]) for entry in again] == [40, 40]


def test_neighbours_of_pictures(here, alexnet, tmp_path, capsys):
    training = draw_shapes(tmp_path / "training", 30)
    (training / "0007.png").write_bytes(b"no picture")
    shutil.copy(training / "0012.png", training / "0029.png")
    (tmp_path / "more").mkdir()
    shutil.copy(training / "0005.png", tmp_path / "more/b.png")
    Image.new("L", (50, 30), 200).save(tmp_path / "more/a.jpg")
    found = call(training, alexnet, f"--n_neighbours 2 --query_images {training}/0012.png {tmp_path}/more")
    assert [Path(entry["query"]).name for entry in found] == ["0012.png", "a.jpg", "b.png"]
    first, _, last = (entry["neighbours"] for entry in found)
    assert [(n["index"], n["distance"]) for n in first] == [(12, 0.0), (29, 0.0)]
    assert last[0] == dict(index=5, name=str(training / "0005.png"), distance=0.0) and last[1]["distance"] > 0
    assert capsys.readouterr().out.count("0007.png' cannot be decoded") == 1
    row = json.loads(Path("logs/nn/metrics.jsonl").read_text())
    assert row["checkpoints"] == {} and row["values"]["training_images"] == 29


def test_mistakes_are_one_line_before_anything_is_done(here, shapes, alexnet, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    for path, named in [("nowhere.png", "does not exist"), ("broken.png", "cannot be decoded"), ("empty", "no images")]:
        line = refused(capsys, shapes, alexnet, f"--query_images {shapes}/0001.png {tmp_path}/{path}")
        assert "--query_images" in line and str(tmp_path / path) in line and named in line
    line = refused(capsys, shapes, tmp_path / "alex.pth", f"--query_images {shapes}")
    assert line == f"error: {tmp_path}/alex.pth does not exist"
    assert "--load_dir must name a trained sampler" in refused(capsys, shapes, alexnet)


def test_training_images_that_are_all_broken(here, alexnet, shapes, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 images cannot be decoded"):
        call(tmp_path, alexnet, f"--query_images {shapes}/0001.png")


def test_as_a_user_calls_it(here, shapes, alexnet, monkeypatch, tmp_path, capsys):
    """As __main__, but in this process: torch takes seconds to import."""

    def run(flags):
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
        runpy.run_path(script.__file__, run_name="__main__")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = flags_of(shapes, alexnet, "--load_dir absorbing --load_step 2 --ema --n_samples 2 --n_neighbours 3")
    with pytest.raises(SystemExit):
        run(flags[: flags.index("--alexnet_weights")])
    line = last_line(capsys)
    assert line.startswith(
        "error: the AlexNet weights for LPIPS are missing: `python experiments/get_weights.py alexnet`"
    )
    run([*flags, "--dry_run"])
    out = capsys.readouterr().out
    assert "absorbing: " in out and "missing" not in out
    run([*flags[: flags.index("--alexnet_weights")], "--dry_run"])
    assert f"note: {line.removeprefix('error: ')}" in capsys.readouterr().out.splitlines()
    assert not Path("logs/nn").exists()
    run(flags)
    text = capsys.readouterr().out
    assert "training_images  40" in text and "logs/nn/images/nearest_neighbours.png" in text
