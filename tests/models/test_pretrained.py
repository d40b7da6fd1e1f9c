"""load_pretrained: the pictures of get_samples, from runs and from published files, and ordinary exceptions."""

import dataclasses
import math
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_SAMPLER, TINY_VQGAN, words
from PIL import Image
from scripts import experiment, prior_flags

from experiments import get_samples
from models import load_pretrained, pretrained
from utils.core.errors import UserError
from utils.core.files import load_tensors, save_tensors


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


HALTON = dict(sample_order="halton", sample_schedule="cosine", steps=7)


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


@pytest.fixture
def published(place, monkeypatch):
    """Published files are weights alone: the shapes are the defaults, here those of the small models."""
    given = dict(zip(TINY_VQGAN, TINY_VQGAN[1:], strict=False)) | dict(
        zip(TINY_SAMPLER, TINY_SAMPLER[1:], strict=False)
    )
    shapes = {k[2:]: int(v) for k, v in given.items() if k[:2] == "--" and v.isdigit()} | dict(ch_mult=[1, 1, 1])
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
        (lambda: load_pretrained("prior").sample(1, order="halton"), ValueError, "order is no setting .*sample_order"),
        (lambda: load_pretrained("prior").sample(1, sample_order="x"), ValueError, "x is unknown: confidence"),
        (
            lambda: load_pretrained("prior").sample(1, sample_order="halton", sample_type="mlm"),
            ValueError,
            "halton contradicts --sample_type mlm",
        ),
        (lambda: load_pretrained("prior").sample(1, steps=0), ValueError, "1 or more"),
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
    assert example.count("logs/demo_absorbing") == 1 and len(words(example)) > 20
    Path("example.py").write_text(example.replace("logs/demo_absorbing", "logs/prior"))
    found = runpy.run_path("example.py")
    assert found["again"].shape == found["images"].shape == (8, 3, 16, 16) and found["ids"].shape == (8, 16)
    assert [Image.open(f"sample_{i}.png").size for i in range(8)] == [(16, 16)] * 8
    assert capsys.readouterr() == ("", "")
