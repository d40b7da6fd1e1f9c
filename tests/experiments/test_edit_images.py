"""experiments/edit_images.py: what it writes, what stays as it was, and what it refuses."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import words
from PIL import Image, ImageDraw
from scripts import experiment, prior_flags

from experiments import compare_inpainting as compare
from experiments import edit_images as script
from experiments.common.editing import Edits, Outpaintings
from models import load_pretrained
from utils.core.errors import UserError
from utils.data.decoding import decode
from utils.data.images import open_images
from utils.data.masks import file_mask, fitted_mask, mask_outside, region_mask, scaled_mask


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The current folder, with the trained models and a picture."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "logs", "logs")
    image = Image.new("RGBA", (32, 32), (240, 160, 20, 255))
    ImageDraw.Draw(image).rectangle((0, 0, 15, 31), fill=(0, 0, 0, 0))
    image.save("a.png")
    Image.new("L", (20, 10), 90).save("grey.jpg")
    return tmp_path


def call(shapes, more, sampler="absorbing", log_dir="edits"):
    """The script in this process. Returns (rows of edits.json, {name: picture (C, H, W)})."""
    shutil.rmtree(f"logs/{log_dir}", ignore_errors=True)
    script.main(experiment(script, prior_flags(shapes, log_dir, more, sampler)))
    images = {p.name: pixels(p) for p in Path(f"logs/{log_dir}/images").glob("edit_*.png") if "steps" not in p.name}
    return json.loads(Path(f"logs/{log_dir}/edits.json").read_text()), images


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_masks_are_resized_with_their_picture():
    region = region_mask((40, 20), [(0, 10, 20, 5), (10, 29, 10, 1)])
    assert np.array(region).nonzero()[0].size == 20 * 5 + 10
    mask = fitted_mask(region, 20)  # columns 10 to 29 are seen
    assert mask[:, :5].all() and not mask[:, 5:19].any() and mask[10:, 19].all() and not mask[:10, 19].any()
    assert fitted_mask(region_mask((100, 100), [(50, 50, 1, 1)]), 10).sum() >= 1, "no pixel is lost"
    with pytest.raises(ValueError, match="5 5 16 1 is not inside the picture, which has 20 rows and 40 columns"):
        region_mask((40, 20), [(5, 5, 16, 1)])
    assert scaled_mask(region, (80, 40)).size == (80, 40)
    assert np.array(scaled_mask(region_mask((400, 200), [(0, 1, 200, 2)]), (40, 20)))[0].tolist() == [255] + [0] * 39
    with pytest.raises(ValueError, match="40 x 20 pixels, and the picture 40 x 40"):
        scaled_mask(region, (40, 40))


def test_a_mask_file(tmp_path):
    Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)).save(tmp_path / "m.png")
    assert np.array(file_mask((tmp_path / "m.png").read_bytes())).tolist() == [[0, 0, 255, 255]]
    Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8)).save(tmp_path / "t.png")
    assert np.array(file_mask((tmp_path / "t.png").read_bytes())).tolist() == [[0, 255]]


def test_halves():
    assert not mask_outside("left", 4)[:, :2].any() and mask_outside("left", 4)[:, 2:].all()
    assert mask_outside("top", 4).tolist() == mask_outside("left", 4).T.tolist()
    assert torch.equal(mask_outside("right", 8), ~mask_outside("left", 8))
    assert torch.equal(mask_outside("bottom", 8), ~mask_outside("top", 8))
    centre = ~mask_outside("centre", 8)
    assert centre[2:6, 2:6].all() and centre.sum() == 16


def test_kept_pixels_are_pasted_back(place, shapes):
    rows, images = call(shapes, "--images a.png --keep right --blend 2 --variants 3 --show_steps")
    original = decode(Path("a.png").read_bytes(), 16)
    assert len(images) == 3 and not torch.equal(images["edit_0_0.png"], images["edit_0_1.png"])
    for image in images.values():
        assert torch.equal(image[:, :, 10:], original[:, :, 10:])
        assert not torch.equal(image[:, :, :8], original[:, :, :8])
    assert [row["redrawn"] for row in rows] == [8] * 3 and rows[1]["result"] == "edit_0_1.png"
    images = Path("logs/edits/images")
    with Image.open(images / "edits.png") as sheet, Image.open(images / "edit_steps.gif") as gif:
        assert sheet.size == (5 * 98 + 2, 100) and 4 <= gif.n_frames <= 8  # equal frames are one
    row = json.loads(Path("logs/edits/metrics.jsonl").read_text())["values"]
    assert row["redrawn"] == 8 and row["codes"] == 16 and 0 < row["changed"] <= 8


def test_what_is_hidden_has_no_influence(place, shapes):
    """The hidden part of the file changes, the result does not; its transparency is the mask."""
    random = [f"--images a.png --variants 2 --seed {seed}" for seed in (0, 0, 1)]
    first, again, other = (call(shapes, more)[1] for more in random)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    H = experiment(script, prior_flags(shapes, "edits", "--images a.png --keep right"))
    models = script.load_models(H)
    names, pictures, masks = script.read_all(H)
    edits = Edits(H, models, pictures, masks)
    changed = Edits(H, models, torch.where(masks[:, None], 255 - pictures, pictures), masks)
    assert torch.equal(edits.ids, changed.ids)
    assert not torch.equal(edits.ids, load_pretrained("prior", device="cpu").encode(pictures))


def test_results_do_not_depend_on_batches_or_other_pictures(place, shapes):
    _, both = call(shapes, "--images a.png grey.jpg --keep top --variants 3 --batch_size 4")
    _, one = call(shapes, "--images grey.jpg --keep top --variants 3 --batch_size 2")
    assert len(both) == 6
    for variant in range(3):
        assert torch.equal(both[f"edit_1_{variant}.png"], one[f"edit_0_{variant}.png"])


def test_variations(place, shapes):
    rows, images = call(shapes, "--images a.png --redraw 0.25 1 --variants 2")
    assert [(row["share"], row["variant"], row["redrawn"]) for row in rows] == [
        (0.25, 0, 4), (0.25, 1, 4), (1.0, 0, 16), (1.0, 1, 16),
    ]  # fmt: skip
    assert len(images) == 4
    _, blended = call(shapes, "--images a.png --redraw 0.25 --variants 1 --blend 0")
    original = decode(Path("a.png").read_bytes(), 16)
    same = (blended["edit_0_0.png"] == original).all(0).view(4, 4, 4, 4).transpose(1, 2).flatten(2).all(2)
    assert same.sum() >= 12, "the other cells are those of the picture"


def test_pictures_of_the_data_set(place, shapes):
    rows, _ = call(shapes, "--numbers 3 0 --split train --region 0 0 1 1 --variants 1")
    assert len({row["picture"] for row in rows}) == 2 and all(row["redrawn"] == 1 for row in rows)


def test_the_autoregressive_sampler(place, shapes):
    rows, _ = call(shapes, "--images a.png --keep top --variants 1 --show_steps", "autoregressive")
    assert rows[0]["redrawn"] == 8
    with pytest.raises(UserError, match="it redraws only codes that come after all kept codes"):
        call(shapes, "--images a.png --keep left", "autoregressive")


# ---------------------------------------------------------------------- outpainting


def outpaintings(shapes, more):
    H = experiment(script, prior_flags(shapes, "edits", f"--images a.png grey.jpg {more}"))
    _, pictures, masks = script.read_all(H)
    return Outpaintings(H, script.load_models(H), pictures, masks, 2, blend=H.blend)


@pytest.mark.parametrize(
    "more", ["", "--sample_order confidence", "--sample_order halton --sample_schedule arccos --remask_eta 0.5"]
)
def test_the_codes_of_a_continued_picture_stay(place, shapes, more):
    edits = outpaintings(shapes, f"--shape 5 9 --at 1 3 {more}")
    ids, drawn = edits.draw(range(4))
    canvases = ids.view(4, 5, 9)
    own = load_pretrained("prior", device="cpu").encode(edits.pictures)
    assert torch.equal(canvases[:, 1:, 3:7].flatten(1), own[[0, 0, 1, 1]])
    assert ids.min() >= 0 and ids.max() < 32 and not torch.equal(ids[0], ids[1])
    assert drawn.shape == (4, 3, 20, 36)
    assert torch.equal(edits.cells([0])[0, 1:, 3:7], torch.zeros(4, 4, dtype=torch.bool))
    assert edits.cells([0]).sum() == 5 * 9 - 16
    again, pictures = edits.draw([3])
    assert torch.equal(again[0], ids[3]) and torch.equal(pictures[0], drawn[3]), "any batch gives the same"


def test_a_continued_picture_is_where_it_belongs(place, shapes):
    edits = outpaintings(shapes, "--shape 4 7 --at 0 2 --blend 1")
    drawn = edits.draw([0])[1][0]
    original = decode(Path("a.png").read_bytes(), 16)
    assert torch.equal(drawn[:, :, 10:22], original[:, :, 2:14]), "pasted back, but for an edge of 1 pixel"
    assert not torch.equal(drawn[:, :, 8:10], original[:, :, :2])
    placed = edits.originals([0])[0]
    assert torch.equal(placed[:, :, 8:24], original) and (placed[:, :, :8] == 140).all()


def test_outpainting(place, shapes):
    rows, images = call(shapes, "--images a.png grey.jpg --shape 6 4 --variants 2 --decode_tile 4 --window_batch 3")
    assert [row["redrawn"] for row in rows] == [8] * 4 and len(images) == 4
    assert all(image.shape == (3, 24, 16) for image in images.values())
    _, one = call(shapes, "--images grey.jpg --shape 6 4 --at 1 0 --variants 2 --decode_tile 4 --batch_size 1")
    for variant in range(2):
        assert torch.equal(images[f"edit_1_{variant}.png"], one[f"edit_0_{variant}.png"])
    row = json.loads(Path("logs/edits/metrics.jsonl").read_text())["values"]
    assert row["codes"] == 24 and row["redrawn"] == 8 and "changed" not in row


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "--images PATH ..., or --numbers"),
        ("--images a.png --numbers 1", "--images PATH ..., or --numbers"),
        ("--images a.png --redraw 0.5 --keep left", "contradicts --keep"),
        ("--images a.png --region 1 2 3", "top left height width"),
        ("--images a.png --mask nowhere.png", "--mask 'nowhere.png' does not exist"),
        ("--images a.png --shape 8 8 --keep left", "around the picture and contradicts --keep"),
        ("--images a.png --shape 8 8 --mask a.png", "contradicts --mask"),
        ("--images a.png --shape 8 8 --region 1 1 1 1", "contradicts --region"),
        ("--images a.png --shape 8 8 --redraw 0.5", "contradicts --redraw"),
        ("--images a.png --shape 8 8 --dilate 1", "contradicts --dilate"),
        ("--images a.png --shape 8 8 --show_steps", "contradicts --show_steps"),
        ("--images a.png --shape 8", "--shape 8 must be two numbers"),
        ("--images a.png --shape 8 8 --at 1", "--at 1 must be two numbers"),
        ("--images a.png --shape 3 8", "smaller than the picture, 4 rows and 4 columns"),
        ("--images a.png --shape 4 4", "there is nothing to draw around it"),
        ("--images a.png --shape 8 6 --at 2 3", "is not inside --shape 8 6; --at is at most 4 2"),
        ("--images a.png --shape 8 6 --sample_type mlm", "needs --sampler absorbing and --sample_type diffusion"),
        ("--images a.png --keep left --at 2 3", "--at 2 3 needs --shape"),
    ],
)
def test_refused_flags(place, shapes, more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        experiment(script, prior_flags(shapes, "edits", more))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_outpainting_needs_the_absorbing_sampler(place, shapes, capsys):
    with pytest.raises(SystemExit):
        call(shapes, "--images a.png --shape 8 4 --at 0 0", "autoregressive")
    assert "--shape needs --sampler absorbing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--images broken.png --keep left", "'broken.png' cannot be decoded"),
        ("--images nowhere.png --keep left", "'nowhere.png' does not exist"),
        ("--images grey.jpg", "'grey.jpg': nothing is marked for redrawing"),
        ("--images grey.jpg --mask broken.png", "--mask: 'broken.png' cannot be decoded"),
        ("--images grey.jpg --mask a.png", "the mask has 32 x 32 pixels, and the picture 20 x 10"),
        ("--images grey.jpg --region 0 0 11 5", "which has 10 rows and 20 columns"),
        ("--images grey.jpg --region 0 0 10 4", "marks no pixel that the model sees"),
        ("--numbers 99 --keep left", "there are 2 images, from 0 to 1"),
    ],
)
def test_refused_pictures(place, shapes, more, message):
    Path("broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=message):
        call(shapes, words(more))
    assert not Path("logs/edits").exists()


# ---------------------------------------------------------------------- comparison


def test_mean_colours_and_nearest_halves(shapes):
    masks = mask_outside("left", 4).expand(2, -1, -1)
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    pictures[0, :, :, 0], pictures[1] = 100, 30
    pictures[1, :, :, 2:] = 200  # masked: without influence
    means = compare.mean_colours(pictures, masks)
    assert (means[0] == 50).all() and (means[1] == 30).all()
    assert compare.step_at_border(pictures, masks).tolist() == pytest.approx([0, 170 / 255])
    images = open_images(dict(paths=[str(shapes)], name="x", origin="x"), "train", 16, hold_out=False)
    chosen = torch.stack([images.load(i) for i in (7, 30)])
    masks = mask_outside("top", 16).expand(2, -1, -1)
    spoilt = torch.where(masks[:, None], 0, chosen).to(torch.uint8)
    found = compare.nearest_halves(images, spoilt, masks, 8, 0)
    assert torch.equal(found, chosen)


def test_training_images_are_not_kept_in_memory(monkeypatch):
    seen = []

    def batches(images, *_):
        for x in images:
            assert not any(ref() is not None for ref in seen[:-1]), "only the last batch is kept"
            batch = x.clone()
            seen.append(weakref.ref(batch))
            yield batch, None
            del batch

    monkeypatch.setattr(compare, "one_pass", batches)
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 1, 3, 4, 4)
    found = compare.nearest_halves(images, images[3] + 0, mask_outside("left", 4)[None], 1, 0)
    assert (found == 3).all() and len(seen) == 5


def test_comparison(place, shapes):
    compare.main(experiment(compare, prior_flags(shapes, "compared", "--compared_images 2")))
    rows = [json.loads(line) for line in Path("logs/compared/metrics.jsonl").read_text().splitlines()]
    values = {row["method"]: row["values"] for row in rows if "method" in row}
    assert values["image"]["psnr"] == 100 and values["image"]["perceptual"] == 0
    pasted, hard = values["model, edge 4"], values["model, edge 0"]
    assert pasted["psnr"] == hard["psnr"] == values["model, not pasted"]["psnr"], "the masked pixels are the same"
    assert pasted["step_at_border"] < hard["step_at_border"]
    assert set(rows[-1]["values"]) == {"1 cells away", "2 cells away"}
    assert Path("logs/compared/images/inpainting.png").is_file()
