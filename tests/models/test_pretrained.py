"""load_pretrained: the results of the scripts, from runs, published files and exported models; ordinary exceptions."""

import csv
import dataclasses
import json
import math
import pickle
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_SAMPLER, TINY_VQGAN, words
from PIL import Image
from scripts import experiment, prior_flags, run

from experiments import edit_images, export, get_samples, judge_images
from hparams.config import names_of
from models import load_pretrained, pretrained
from utils.core import exported
from utils.core.errors import UsageError, UserError
from utils.core.files import hash_json, load_tensors, save_tensors, write_json
from utils.data.decoding import decode
from utils.data.masks import mask_outside


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The current folder, with copies of the trained models."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "logs", "logs")
    return tmp_path


def drawn(shapes, more, sampler="absorbing"):
    """The single images that get_samples draws, (n, C, H, W)."""
    H = experiment(get_samples, prior_flags(shapes, "samples", f"--n_samples 10 {more}", sampler))
    get_samples.main(H)
    paths = [f"logs/samples/images/sample_{i}.png" for i in range(10)]
    return torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])


HALTON = dict(order="halton", schedule="cosine", steps=7)


@pytest.mark.parametrize(
    ("name", "sampler", "flags", "arguments"),
    [
        ("prior", "absorbing", "", {}),
        ("logs/prior", "absorbing", "--seed 3 --temp 0.7 --sample_steps 5", dict(seed=3, temp=0.7, steps=5)),
        ("prior", "absorbing", "--sample_order halton --sample_schedule cosine --sample_steps 7", HALTON),
        ("prior", "absorbing", "--sample_order confidence", dict(sample_order="confidence")),
        ("prior", "absorbing", "--remask_eta 0.5", dict(remask_eta=0.5)),
        ("prior", "absorbing", "--temp_end 0.5 --top_k 9 --top_p 0.8", dict(temp_end=0.5, top_k=9, top_p=0.8)),
        ("ar", "autoregressive", "--seed 3 --top_k 5", dict(seed=3, top_k=5)),
    ],
)
def test_samples_are_those_of_get_samples(name, sampler, flags, arguments, place, shapes):
    images = load_pretrained(name, device="cpu").sample(10, **arguments)
    assert images.dtype == torch.uint8 and images.shape == (10, 3, 16, 16)
    assert len(images.flatten(1).unique(dim=0)) > 1
    assert torch.equal(images, drawn(shapes, flags, sampler))


def test_encode_and_decode(place):
    model, ae = (load_pretrained(name, device="cpu") for name in ("prior", "ae"))
    x = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8)
    ids = ae.encode(x)
    assert ids.shape == (11, 16) and ids.dtype == torch.int64
    assert torch.equal(model.encode(x.float() / 255), ids)
    x_hat = model.decode(ids.view(11, 4, 4))
    assert x_hat.dtype == torch.uint8 and torch.equal(x_hat, ae.decode(ids))
    whole = ae.autoencoder.decode(ids, 4, 4)
    assert (x_hat - 255 * whole.clamp(0, 1)).abs().max() <= 0.5001
    assert "vqgan_ema_4.th" in repr(ae) and "absorbing_ema_3.th" in repr(model)


def test_absolute_paths_find_the_autoencoder_beside(place, monkeypatch):
    expected = load_pretrained("prior", device="cpu").sample(2)
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert torch.equal(load_pretrained(place / "logs" / "prior", device="cpu").sample(2), expected)


def test_a_renamed_autoencoder(place):
    expected = load_pretrained("prior", device="cpu").sample(2)
    Path("logs/ae").rename("logs/other")
    with pytest.raises(FileNotFoundError, match="there is no folder logs/ae"):
        load_pretrained("prior", device="cpu")
    assert torch.equal(load_pretrained("prior", autoencoder="logs/other", device="cpu").sample(2), expected)


def test_another_autoencoder_is_refused(place):
    path, manifest = Path("logs/ae/saved_models/vqgan_ema_4.th"), Path("logs/ae/saved_models/manifest_4.json")
    state = load_tensors(path)
    state["ae.quantize.embedding.weight"] += 1
    save_tensors(path, state)
    with pytest.raises(UserError, match="contents are not what was written"):
        load_pretrained("prior", device="cpu")
    manifest.unlink()
    with pytest.raises(ValueError, match=r"logs/prior was trained on the codes of logs/ae/.*not this"):
        load_pretrained("prior", device="cpu")


def test_the_autoencoder_is_the_one_of_the_manifest_not_the_newest(place):
    """Averaged weights may have been added since, and later steps."""
    models = Path("logs/ae/saved_models")
    shutil.copy(models / "vqgan_4.th", models / "vqgan_900.th")
    assert "vqgan_ema_4.th" in repr(load_pretrained("prior", device="cpu"))


def test_pil_images_are_read_as_training_images(place):
    """Any size and mode, and rotated as the file says."""
    picture = Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 40).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save("a.png")
    exif = Image.Exif()
    exif[274] = 6
    picture.convert("L").save("b.jpg", exif=exif)
    files = torch.stack([decode(Path(name).read_bytes(), 16) for name in ("a.png", "b.jpg")])
    opened = [Image.open("a.png"), Image.open("b.jpg")]
    model = load_pretrained("ae", device="cpu")
    assert torch.equal(model.encode(opened), model.encode(files))
    assert torch.equal(model.encode(opened[1]), model.encode(files[1:])) and opened[1].size == (40, 24)


def edited(shapes, more):
    """The results of edit_images, (n, C, H, W)."""
    shutil.rmtree("logs/edits", ignore_errors=True)
    edit_images.main(experiment(edit_images, prior_flags(shapes, "edits", more)))
    paths = sorted(Path("logs/edits/images").glob("edit_*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])


def test_edits_are_those_of_edit_images(place, shapes):
    pictures = [Image.open(path).convert("RGB").resize((32, 24)) for path in sorted(shapes.glob("*.png"))[:3]]
    for i, picture in enumerate(pictures):
        picture.save(f"{i}.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (12, 0, 25, 31))
    mask.save("mask.png")
    more = "--images 0.png 1.png 2.png --mask mask.png --variants 2 --seed 5 --temp 0.9 --sample_steps 6"
    model = load_pretrained("prior", device="cpu")
    given = dict(seed=5, temp=0.9, steps=6, variants=2)
    images = model.edit(pictures, mask, **given)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 16, 16)
    assert len(images.flatten(1).unique(dim=0)) > 3 and torch.equal(images, edited(shapes, more))
    more += " --blend 2 --dilate 1 --sample_order halton"
    blended = model.edit(pictures, [mask] * 3, **given, blend=2, dilate=1, order="halton")
    assert torch.equal(blended, edited(shapes, more)) and not torch.equal(blended, images)

    x = torch.stack([decode(Path(f"{i}.png").read_bytes(), 16) for i in range(3)])
    keep_left = mask_outside("left", 16)
    tensors = model.edit(x.float() / 255, keep_left, seed=5, blend=0)
    assert torch.equal(
        tensors, edited(shapes, "--images 0.png 1.png 2.png --keep left --variants 1 --seed 5 --blend 0 --temp 1")
    )
    assert torch.equal(tensors[..., :8], x[..., :8]) and not torch.equal(tensors[..., 8:], x[..., 8:])
    assert torch.equal(model.edit(x[1:2], keep_left[None], seed=5, blend=0), tensors[1:2])


def test_the_likelihood_is_that_of_judge_images(place, shapes):
    paths = sorted(shapes.glob("*.png"))[:9]
    flags = prior_flags(shapes, "judged", f"--images {' '.join(map(str, paths))} --seed 3 --repeats 2 --passes 5")
    judge_images.main(experiment(judge_images, flags))
    with open("logs/judged/likelihood.csv", newline="") as f:
        bits = torch.tensor([float(row["bits_per_code"]) for row in csv.DictReader(f)], dtype=torch.float64)
    model = load_pretrained("prior", device="cpu")
    found = model.log_likelihood([Image.open(path) for path in paths], passes=5, seed=3, repeats=2)
    assert found.dtype == torch.float64 and found.shape == (9,) and len(found.unique()) == 9
    assert torch.allclose(-found / (16 * math.log(2)), bits, rtol=1e-12)


def test_the_likelihood_of_the_autoregressive_sampler_is_exact(place):
    model = load_pretrained("ar", device="cpu")
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ids, total = model.encode(x), torch.zeros(2, dtype=torch.float64)
    for i in range(16):  # the chain rule
        known = ids.clone()
        known[:, i:] = model.sampler.mask_id
        logits = model.sampler.predict(known, torch.arange(2), torch.full((2,), i))
        total += logits.double().log_softmax(-1)[torch.arange(2), ids[:, i]]
    assert torch.allclose(model.log_likelihood(x), total, atol=1e-4)


def test_a_saved_model_draws_the_same(place, monkeypatch):
    """The exported folder alone, in another place: samples, codes and likelihoods, bit for bit."""
    for name in ("prior", "ar", "ae"):
        model = load_pretrained(name, device="cpu")
        model.save(f"exported/{name}", card=dict(license="CC0"))
        manifest = json.loads(Path(f"logs/{name}/saved_models/manifest_{4 if name == 'ae' else 3}.json").read_text())
        record = json.loads(Path(f"exported/{name}/model.json").read_text())
        hashes = {file: about["hash"] for file, about in record["files"].items()}
        if name != "ae":
            assert hashes["autoencoder.safetensors"] == manifest["autoencoder"]["hash"]
        assert record["origin"][-1] == "ae/saved_models/vqgan_ema_4.th" or name == "ar"
        assert str(place) not in json.dumps(record)
        x = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        with monkeypatch.context() as patch:
            Path("elsewhere").mkdir(exist_ok=True)
            Path("elsewhere", name).unlink(missing_ok=True)
            patch.chdir("elsewhere")
            again = load_pretrained(place / "exported" / name, device="cpu")
        assert again.card == dict(license="CC0") and "autoencoder.safetensors" in repr(again)
        assert torch.equal(again.encode(x), model.encode(x))
        if name != "ae":
            assert torch.equal(again.sample(5, seed=1), model.sample(5, seed=1))
            assert torch.equal(again.log_likelihood(x), model.log_likelihood(x))
        again.save(f"twice/{name}")
        for file in record["files"]:
            assert Path(f"twice/{name}/{file}").read_bytes() == Path(f"exported/{name}/{file}").read_bytes()
    shutil.move("exported/prior", "logs/moved")
    assert load_pretrained("moved").sample(1).equal(load_pretrained("logs/moved").sample(1))
    with pytest.raises(ValueError, match="logs/moved is an exported model: leave autoencoder= and step= out"):
        load_pretrained("moved", step=3)


def test_damaged_exported_models_are_refused(place):
    load_pretrained("prior", device="cpu").save("whole")

    def damaged(change, message):
        shutil.rmtree("broken", ignore_errors=True)
        shutil.copytree("whole", "broken")
        change(Path("broken"))
        with pytest.raises(UserError, match=message) as caught:
            load_pretrained("broken", device="cpu")
        assert len(str(caught.value).splitlines()) == 1

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    def describe(**changes):
        """A hostile author gives the right digest."""

        def change(folder):
            record = json.loads((folder / "model.json").read_text())
            record.pop("digest")
            record = {**record, **{k: {**record[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}}
            write_json(folder / "model.json", dict(record, digest=hash_json(record)))

        return change

    def pickled(folder):
        path = folder / "sampler.safetensors"
        about = save_tensors(path, load_tensors("logs/prior/saved_models/absorbing_ema_3.th"))
        describe(files={path.name: about})(folder)

    damaged(lambda folder: flip(folder / "sampler.safetensors"), "sampler.safetensors is damaged: its contents are not")
    damaged(lambda folder: (folder / "autoencoder.safetensors").unlink(), "autoencoder.safetensors is missing")
    damaged(lambda folder: (folder / "model.json").write_text("[1]"), "model.json is damaged")
    damaged(lambda folder: flip(folder / "model.json"), "model.json is damaged")
    damaged(describe(format=2), "has the format 2: this version of the program reads 1")
    damaged(describe(files=3), "does not describe a model")
    damaged(describe(files={"../x": {}}), "it must list autoencoder.safetensors")
    damaged(describe(files={"sampler.safetensors": 3}), "sampler.safetensors is damaged")
    damaged(describe(hparams={"nf": "x"}), r"model.json is damaged: .*nf 'x' must be a whole number")
    damaged(describe(hparams={"nf": 64}), "does not fit the configured model")
    damaged(pickled, "not a readable safetensors file")


def test_a_killed_save_can_be_repeated(place, monkeypatch):
    """model.json is written last; without it the folder is no model and may be written again."""
    model = load_pretrained("prior", device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(exported, "write_json", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            model.save("half")
    assert sorted(path.name for path in Path("half").iterdir()) == ["autoencoder.safetensors", "sampler.safetensors"]
    model.save("half")
    assert load_pretrained("half", device="cpu").sample(2).equal(model.sample(2))
    with pytest.raises(UserError, match="half is not empty"):
        model.save("half")


MODEL = names_of("autoencoder", "sampler", "sampling")


@pytest.fixture
def published(place, monkeypatch):
    """Published files are weights alone: the shapes are the defaults, here those of the small models."""
    given = dict(zip(TINY_VQGAN, TINY_VQGAN[1:], strict=False)) | dict(
        zip(TINY_SAMPLER, TINY_SAMPLER[1:], strict=False)
    )
    shapes = {k[2:]: int(v) for k, v in given.items() if k[2:] in MODEL and v.isdigit()} | dict(ch_mult=[1, 1, 1])
    small = {
        name: dataclasses.replace(flag, default=shapes[name], meta={k: v for k, v in flag.meta.items() if k != "older"})
        for name, flag in pretrained.FLAGS.items()
        if name in shapes
    }
    monkeypatch.setattr(pretrained, "FLAGS", pretrained.FLAGS | small)
    for path in Path("logs").rglob("*"):
        if path.is_file() and not re.fullmatch(r"\w+_ema_\d\.th", path.name):
            path.unlink()


def test_weights_that_are_not_numbers_are_refused(published):
    path = "logs/prior/saved_models/absorbing_ema_3.th"
    state = load_tensors(path)
    state["_denoise_fn.head.weight"][0, 0] = math.nan
    save_tensors(path, state)
    with pytest.raises(UserError, match=r"absorbing_ema_3\.th.*'_denoise_fn\.head\.weight' are not finite"):
        load_pretrained("prior", autoencoder="logs/ae", device="cpu")


def test_published_folders_take_the_autoencoder(published):
    with pytest.raises(ValueError, match="logs/prior does not record its autoencoder: pass autoencoder="):
        load_pretrained("prior", device="cpu")
    model = load_pretrained("prior", autoencoder="logs/ae", device="cpu")
    assert model.sample(2).shape == (2, 3, 16, 16)
    assert load_pretrained("ae", step=4, device="cpu").encode(model.sample(2)).shape == (2, 16)


def test_published_folders_are_exported_with_the_autoencoder_of_the_command_line(published, capsys):
    with pytest.raises(UsageError, match=r"pass autoencoder='logs/NAME' \(in commands: --ae_load_dir NAME\)"):
        export.main(export.parse(words("--load_dir prior --target out")))
    export.main(export.parse(words("--load_dir prior --ae_load_dir ae --target out --license MIT")))
    line = "logs/prior/saved_models/absorbing_ema_3.th and logs/ae/saved_models/vqgan_ema_4.th -> out (1.1 MiB)"
    assert capsys.readouterr().out.startswith(line)
    model, again = load_pretrained("prior", autoencoder="ae", device="cpu"), load_pretrained("out", device="cpu")
    assert torch.equal(again.sample(3), model.sample(3)) and again.card == dict(license="MIT")


def test_exporting_as_a_user_would(place):
    flags = ["--load_dir", "prior", "--load_step", "3", "--target", "out/emoji", "--description", "discs and boxes"]
    assert "-> out/emoji (" in run("experiments/export.py", flags, place)
    assert load_pretrained("out/emoji").card == dict(description="discs and boxes")
    unknown = words("--load_dir nowhere --target new")
    assert run("experiments/export.py", unknown, place, 2) == "error: there is no folder logs/nowhere\n"
    with pytest.raises(UserError, match=r"out/emoji is not empty \(it holds model.json\)"):
        export.main(export.parse(flags))
    with open("logs/prior/saved_models/absorbing_ema_3.th", "wb") as file:
        pickle.dump(Path(), file)
    Path("logs/prior/saved_models/manifest_3.json").unlink()
    with pytest.raises(UserError, match="absorbing_ema_3.th is refused: damaged, or holds more than tensors"):
        export.main(export.parse(words("--load_dir prior --target new")))
    assert not Path("new").exists()


def test_a_run_without_configuration_in_its_manifest_has_config_json(place):
    """As the first versions wrote them: config.json holds the configuration."""
    for path in Path("logs").rglob("manifest_*.json"):
        path.unlink()
    assert load_pretrained("prior", device="cpu").sample(2).shape == (2, 3, 16, 16)
    Path("logs/prior/config.json").write_text('{"hparams": 3}')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_pretrained("prior", device="cpu")


X = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: load_pretrained("nowhere"), FileNotFoundError, "no folder logs/nowhere"),
        (lambda: load_pretrained("../logs/prior"), ValueError, "not a name under logs/"),
        (lambda: load_pretrained("prior", step=8), FileNotFoundError, "no step 8 of 'absorbing': there are 3"),
        (lambda: load_pretrained("prior", "ar"), FileNotFoundError, "logs/ar/saved_models holds no weights of vqgan"),
        (lambda: load_pretrained("ae", "ae"), ValueError, "leave autoencoder= out"),
        (lambda: load_pretrained("ae").sample(1), ValueError, "draws no samples"),
        (lambda: load_pretrained("ar").sample(1, steps=3), ValueError, "leave steps out"),
        (
            lambda: load_pretrained("ar").sample(1, sample_order="halton"),
            ValueError,
            "no setting of sampling of .*: top_k, top_p",
        ),
        (
            lambda: load_pretrained("prior").sample(1, oder="halton"),
            ValueError,
            "oder is no setting .*order, .*, steps",
        ),
        (
            lambda: load_pretrained("prior").sample(1, order="raster", sample_order="raster"),
            ValueError,
            "order, sample_order: only one",
        ),
        (lambda: load_pretrained("ae").edit(X, X[:, 0] == 0), ValueError, "draws no samples"),
        (lambda: load_pretrained("prior").edit(X, X[:, 0]), ValueError, r"mask of torch.float32, shape \(2, 16, 16\)"),
        (lambda: load_pretrained("prior").edit(X, X[0, 0] > 0), ValueError, "a mask marks no pixel"),
        (lambda: load_pretrained("prior").edit(X, X[0, 0] == 0, variants=0), ValueError, "variants must be 1 or more"),
        (lambda: load_pretrained("prior").edit(X, Image.new("L", (8, 4))), ValueError, "mask has 8 x 4 pixels"),
        (lambda: load_pretrained("prior").edit(X, [Image.new("L", (8, 8))] * 3), ValueError, "3 masks for 2 images"),
        (lambda: load_pretrained("prior").edit(X, "mask.png"), ValueError, "mask of str: a tensor, a PIL image or"),
        (lambda: load_pretrained("ar").edit(X, torch.eye(16) > 0), UserError, "redraws only codes that come after"),
        (lambda: load_pretrained("prior").log_likelihood(X, passes=0), ValueError, "passes=0"),
        (lambda: load_pretrained("ae").encode(X[:0]), ValueError, "is needed"),
        (lambda: load_pretrained("ae").encode(X.numpy()), ValueError, "images of ndarray: a tensor, a PIL image or"),
        (lambda: load_pretrained("ae").encode([]), ValueError, "images of list"),
        (lambda: load_pretrained("ae").save("logs/ae"), ValueError, "logs/ae is not empty"),
        (lambda: load_pretrained("ae").save("new", card=dict(year=2026)), ValueError, "a dict of texts"),
        (lambda: load_pretrained("prior").sample(1, sample_order="x"), ValueError, "x is unknown: confidence"),
        (
            lambda: load_pretrained("prior").sample(1, sample_order="halton", sample_type="mlm"),
            ValueError,
            "halton contradicts --sample_type mlm",
        ),
        (lambda: load_pretrained("prior").sample(1, steps=0), ValueError, "sample_steps 0 is too small"),
        (lambda: load_pretrained("prior").sample(0), ValueError, "n=0"),
        (lambda: load_pretrained("prior").sample(1, temp=0), ValueError, "above 0"),
        (lambda: load_pretrained("ae").encode(X[:, :1]), ValueError, r"\(2, 1, 16, 16\): \(B, 3, 16, 16\) is needed"),
        (lambda: load_pretrained("ae").encode(X + 2), ValueError, r"floats in \[0, 1\]"),
        (lambda: load_pretrained("ae").encode(X.long()), ValueError, "torch.int64: uint8"),
        (lambda: load_pretrained("ae").decode(torch.full((1, 16), 16)), ValueError, r"0 \.\.\. 15"),
        (lambda: load_pretrained("ae").decode(torch.zeros(1, 16)), ValueError, r"integers \(B, 16\) are needed"),
    ],
)
def test_mistakes_are_ordinary_exceptions(call, kind, message, place):
    with pytest.raises(kind, match=message):
        call()


def test_the_example_of_the_readme(place, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example.count("logs/demo_absorbing") == 1 and example.count("32, 32") == 4 and example.count("16:") == 1
    example = example.replace("logs/demo_absorbing", "logs/prior").replace("32, 32", "16, 16").replace("16:", "8:")
    Path("example.py").write_text(example)
    found = runpy.run_path("example.py")
    images, edited = found["images"], found["edited"]
    assert found["again"].shape == edited.shape == images.shape == (8, 3, 16, 16) and found["ids"].shape == (8, 16)
    assert not torch.equal(edited, images) and found["nats"].shape == (8,) and (found["nats"] < 0).all()
    assert Image.open("edited.png").size == (16, 16)
    assert torch.equal(load_pretrained("exports/demo").decode(found["ids"]), found["again"])
    assert capsys.readouterr() == ("", "")
