"""experiments/judge_images.py: the likelihood of pictures, maps of surprise, planted defects."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_shapes
from PIL import Image
from scripts import experiment, prior_flags

from experiments import judge_images as script
from utils.core.errors import UserError


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "logs", "logs")
    draw_shapes(tmp_path / "more", 6)
    return tmp_path


def call(shapes, more, sampler="absorbing"):
    """The script in this process -> (rows of likelihood.csv, values of the report)."""
    shutil.rmtree("logs/judged", ignore_errors=True)
    script.main(experiment(script, prior_flags(shapes, "judged", more, sampler)))
    with open("logs/judged/likelihood.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return rows, json.loads(Path("logs/judged/metrics.jsonl").read_text())["values"]


def test_judging(place, shapes):
    rows, values = call(shapes, f"--images more --compare_with {shapes} --defects 7 --subsets 4 --repeats 3")
    assert [row["set"] for row in rows] == ["images"] * 6 + ["compare_with"] * 40
    bits = [float(row["bits_per_code"]) for row in rows]
    assert values["bits per code, images"] == pytest.approx(np.mean(bits[:6]))
    assert values["bits per code, compare_with"] == pytest.approx(np.mean(bits[6:]))
    assert values["AUROC"] == script.auroc(bits[6:], bits[:6])
    assert all(float(row["standard_error"]) > 0 for row in rows) and 0 < values["defects"] <= 7
    names = {path.name for path in Path("logs/judged/images").iterdir()}
    assert names == {"likely.png", "surprise.png", "defects.png", "histogram.png"}
    again, _ = call(shapes, "--images more --repeats 3 --batch_size 4")
    for row, other in zip(rows[:6], again, strict=True):
        assert float(row["bits_per_code"]) == pytest.approx(float(other["bits_per_code"]), abs=1e-5), "in any batch"


def test_maps_do_not_depend_on_batches(place, shapes):
    maps = []
    for batch in (2, 3):
        H = experiment(script, prior_flags(shapes, "judged", f"--images more --subsets 4 --batch_size {batch}"))
        models = script.load_models(H)
        ids = torch.randint(0, H.codebook_size, (6, H.block_size), generator=torch.Generator().manual_seed(0))
        maps.append(script.surprise_maps(H, models, ids))
    torch.testing.assert_close(*maps, atol=1e-4, rtol=0)


def test_defects_that_cannot_be_planted_are_refused_before_the_work(place, shapes):
    with pytest.raises(UserError, match="no patch of one changes another"):
        call(shapes, "--images more/0000.png --defects 2")
    assert not Path("logs/judged").exists()


def test_the_autoregressive_sampler_is_refused(place, shapes):
    with pytest.raises(UserError, match="judging needs an absorbing sampler"):
        call(shapes, "--images more", "autoregressive")
    Path("broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="'broken.png' cannot be decoded"):
        call(shapes, "--images broken.png")


def test_auroc():
    assert script.auroc([3, 4], [1, 2]) == 1 and script.auroc([1, 2], [3, 4]) == 0
    assert script.auroc([1, 3], [2, 2]) == 0.5 and script.auroc([1], [1]) == 0.5


def test_planted_patches():
    H = SimpleNamespace(latent_shape=[1, 8, 8], img_size=16, seed=0)
    pictures = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    pictures[1, :, 8:] = 200  # the upper halves are equal
    found, patches = script.plant(H, pictures, 4)
    assert len(found) == 4 and (patches.sum((1, 2)) == 4).all()
    for i in range(4):
        pixels = script.to_pixels(patches[i : i + 1], 16)[0]
        assert torch.equal(found[i][:, ~pixels], pictures[i % 2][:, ~pixels])
        assert not torch.equal(found[i][:, pixels], pictures[i % 2][:, pixels])
    with pytest.raises(UserError, match="no patch of one changes another"):
        script.plant(H, pictures[:1].expand(2, -1, -1, -1), 2)


def test_heat():
    picture = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    shown = script.heat(picture, torch.tensor([[0.0, 2.0], [8.0, 4.0]]), 4.0)
    assert shown[:, 0, 0].tolist() == [100, 100, 100] and shown[:, 3, 0].tolist() == shown[:, 3, 3].tolist()
    assert shown[:, 3, 3].tolist() == [224, 20, 20] and shown[:, 0, 3].tolist() == [162, 60, 60]


def test_defaults_are_the_validation_images(place, shapes, capsys):
    rows, values = call(shapes, "--repeats 2")
    assert "logs/prior was trained without validation, on all images" in capsys.readouterr().out
    assert len(rows) == 2 and set(values) == {"bits per code, images"}
    with Image.open("logs/judged/images/likely.png") as picture:
        assert picture.width > 96
