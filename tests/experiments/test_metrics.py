"""The metrics: their arithmetic against plain definitions, their caches, the scripts on tiny models."""

import hashlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_shapes
from lpips import LPIPS
from PIL import Image
from scripts import experiment, prior_flags, vqgan_flags
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception

from experiments import calc_approximate_ELBO, calc_FID, calc_PRDC, calc_VQGAN_FID, get_samples
from experiments.common import measure
from experiments.common.models import load_models
from experiments.common.weights import Loaded
from utils.core.errors import DamagedFile, UsageError, UserError
from utils.core.files import load_tensors, save_tensors
from utils.data.pixels import to_uint8
from utils.evaluation import feature_files, features
from utils.evaluation.features import Inception, collect, regroup
from utils.evaluation.metrics import METRICS
from utils.evaluation.weight_files import WEIGHT_FILES


class SmallExtractor:
    """In the place of Inception, which takes 0.1 s an image: means over a grid as features, some as logits."""

    identity = dict(extractor="means", weights="none")
    seen = 0

    def __init__(self, *_):
        pass

    def __call__(self, x):
        type(self).seen += len(x)
        means = nn.functional.adaptive_avg_pool2d(x.float().cpu() / 16, 2).flatten(1)
        return means, means[:, :5]


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A folder in which the trained models are, and nothing else; a small extractor."""
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    for name in ("ae", "prior", "ar"):
        Path("logs", name).symlink_to(trained / "logs" / name)
    monkeypatch.setattr(features, "Inception", SmallExtractor)
    SmallExtractor.seen = 0
    return tmp_path


def call(script, words):
    """Run the script in this process; returns its last line of metrics.jsonl."""
    H = experiment(script, words)
    script.main(H)
    path = Path("logs", H.log_dir, "metrics.jsonl")
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else None


def pngs(folder):
    return torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in sorted(folder.glob("*.png"))])


# ---------------------------------------------------------------------- features


def test_statistics_are_those_of_all_features():
    x = [torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8) for n in (5, 1, 7)]
    found = collect(map(SmallExtractor(), x), "x", keep=True, logits=True)
    plain = SmallExtractor()(torch.cat(x))[0].double().numpy()
    assert found.count == 13 and torch.equal(found.features.double(), torch.from_numpy(plain))
    np.testing.assert_allclose(found.statistics()["mu"], plain.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.statistics()["sigma"], np.cov(plain, rowvar=False), rtol=1e-9, atol=1e-12)
    assert found.logits.shape == (13, 5)


def test_one_image_has_no_statistics():
    with pytest.raises(UserError, match="two or more"):
        collect([SmallExtractor()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))], "features of x")


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_regroup(size):
    lengths, rows = (3, 1, 7, 2), torch.arange(13)
    groups = list(regroup(rows.split(lengths), size))
    assert torch.equal(torch.cat(groups), rows)
    assert all(len(g) == size for g in groups[:-1]) and 0 < len(groups[-1]) <= size


@pytest.mark.parametrize("name", ["f.npy", "f.pt"])
def test_features_in_files(tmp_path, name):
    values, path, made_by = torch.randn(4, 3), tmp_path / name, dict(what="x", seed=3, images=dict(size=[1, 2]))
    digest = feature_files.write(path, values, made_by)
    found = feature_files.read(path)
    assert torch.equal(found.features, values) and found.made_by == made_by
    assert digest == found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if name == "f.npy":
        assert np.array_equal(np.load(path), values.numpy()), "numpy reads the features"
    path.write_bytes(b"\x93NUMPY rubbish")
    with pytest.raises(DamagedFile, match=name):
        feature_files.read(path)


@pytest.mark.parametrize("name", ["f.npy", "f.pt"])
def test_a_header_goes_with_its_features_only(tmp_path, name):
    """Whatever byte is changed, no features pass under the header of others."""
    values, path = torch.randn(3, 2), tmp_path / name
    feature_files.write(path, values, dict(seed=3))
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = feature_files.read(path)
        except UserError:
            continue
        assert found.made_by is None or (found.made_by == dict(seed=3) and torch.equal(found.features, values)), at


def test_features_of_other_programs_have_no_header(tmp_path):
    values = torch.randn(4, 3)
    np.save(tmp_path / "f.npy", values.double().numpy())
    save_tensors(tmp_path / "f.pt", values)
    with open(tmp_path / "two.npy", "wb") as f:
        np.save(f, values.numpy())
        np.save(f, values.numpy())
    for name in ("f.npy", "f.pt", "two.npy"):
        found = feature_files.read(tmp_path / name)
        assert torch.equal(found.features, values) and found.made_by is None


def test_features_files_cannot_run_code(tmp_path):
    np.save(tmp_path / "f.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedFile):
        feature_files.read(tmp_path / "f.npy")


# ---------------------------------------------------------------------- Inception's weights


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file like torch-fidelity's, with random weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    save_tensors(path, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = inception.FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=str(path))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    save_tensors(path, net.state_dict())
    return path


def test_missing_weights_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/hub/checkpoints/weights-inception.*--feature_weights PATH"):
        Inception(None, torch.device("cpu"))
    with pytest.raises(UserError, match="/no/such does not exist"):
        Inception("/no/such", torch.device("cpu"))


def test_weights_that_are_none(tmp_path):
    save_tensors(tmp_path / "w.pth", dict(a=torch.zeros(1)))
    with pytest.raises(UserError, match="does not hold torch-fidelity's Inception weights"):
        Inception(tmp_path / "w.pth", torch.device("cpu"))
    torch.save(dict(a=print), tmp_path / "w.pth")
    with pytest.raises(DamagedFile, match="refused"):
        Inception(tmp_path / "w.pth", torch.device("cpu"))


def test_inception_features(inception_file):
    extractor = Inception(inception_file, torch.device("cpu"))
    grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    values, logits = extractor(grey)
    assert values.shape == (2, 2048) and logits.shape == (2, 1008)
    assert torch.equal(extractor(grey.repeat(1, 3, 1, 1))[0], values)
    assert len(extractor.identity["weights"]) == 64


@pytest.mark.slow
def test_fid_and_kid_equal_torch_fidelitys_command_line(shapes, trained, inception_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("logs").symlink_to(trained / "logs")
    flags = ["--n_samples", "12", "--kid", "--save_images", "--feature_weights", str(inception_file)]
    row = call(calc_FID, prior_flags(shapes, tmp_path.name, flags))
    fidelity = Path(sys.executable).with_name("fidelity")
    done = subprocess.run(
        [
            fidelity,
            "--fid",
            "--kid",
            "--kid-subset-size",
            "12",
            "--input1",
            f"logs/{tmp_path.name}/samples",
            "--input2",
            str(shapes),
            "--json",
            "--samples-resize-and-crop",
            "16",
            "--feature-extractor-weights-path",
            str(inception_file),
            "--no-cache",
            "--save-cpu-ram",
            "--silent",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(done.stdout)
    assert row["values"]["fid"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    assert theirs["frechet_inception_distance"] > 0.01
    for ours, name in (("kid", "mean"), ("kid_std", "std")):
        assert row["values"][ours] == pytest.approx(theirs[f"kernel_inception_distance_{name}"], rel=1e-3)


# ---------------------------------------------------------------------- a new metric

TOY = """

class Colours:
    identity = dict(extractor="mean colours", weights="none")

    def __call__(self, x):
        colours = x.float().mean((2, 3)).cpu()
        return colours, colours[:, :0]


@metric("distance of the mean colours", extractor=lambda H, device: Colours(), keep=True)
def colour_distance(real, fake, H):
    return dict(colour_distance=float((real.features.mean(0) - fake.features.mean(0)).norm()))
"""


def test_a_new_metric_is_one_entry(trained, shapes, tmp_path):
    """From the command line: its flag, its own features in the cache, its number in the table, next to the FID."""
    for folder in ("hparams", "models", "utils", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "datasets.yaml", tmp_path)
    (tmp_path / "logs").mkdir()
    for name in ("ae", "prior"):
        (tmp_path / "logs" / name).symlink_to(trained / "logs" / name)
    stand_in = f"\n\nfrom torch import nn\n\n{inspect.getsource(SmallExtractor)}\nInception = SmallExtractor\n"
    for module, text in (("metrics", TOY), ("features", stand_in)):
        with open(tmp_path / f"utils/evaluation/{module}.py", "a") as file:
            file.write(text)

    def run(*flags):
        command = [sys.executable, "experiments/calc_FID.py", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--colour_distance" in run("--help")
    out = run(*prior_flags(shapes, "out", "--n_samples 6 --colour_distance --save_images"))
    row = json.loads((tmp_path / "logs/out/metrics.jsonl").read_text())
    assert re.search(r"^  colour_distance +[\d.]+$", out, re.MULTILINE) and row["values"]["fid"] > 0
    saved = pngs(tmp_path / "logs/out/samples").float().mean((0, 1, 2))
    expected = (pngs_at_16(shapes).float().mean((0, 2, 3)) - saved).norm().item()
    assert row["values"]["colour_distance"] == pytest.approx(expected, rel=1e-4)
    assert [network["extractor"] for network in row["features"]] == ["means", "mean colours"]
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_samples_are_drawn_once_for_several_networks(place, shapes, monkeypatch):
    H = experiment(calc_FID, prior_flags(shapes, "x", "--n_samples 6"))
    drawn, draw = [], measure.sample_batches
    monkeypatch.setattr(measure, "sample_batches", lambda *args: drawn.append(args) or draw(*args))
    samples = measure.Samples(H, load_models(H), 6)
    other = type("Other", (SmallExtractor,), dict(identity=dict(extractor="other", weights="none")))
    first, second = (samples.features(extractor) for extractor in (SmallExtractor(), other()))
    assert torch.equal(first.features, second.features) and samples.all_ids().shape == (6, 16)
    assert len(drawn) == 1


# ---------------------------------------------------------------------- FID


def test_kid_takes_the_samples_first():
    from torch_fidelity.metric_kid import kid_features_to_metric

    random = torch.Generator().manual_seed(0)
    real, fake = torch.randn(50, 4, generator=random), torch.randn(40, 4, generator=random) + 0.1
    sides = (features.FeatureSet(len(x), features=x) for x in (real, fake))
    found = list(METRICS["kid"].compute(*sides, None).values())
    theirs = [kid_features_to_metric(*pair, kid_subset_size=40, verbose=False) for pair in ((fake, real), (real, fake))]
    assert found == list(theirs[0].values()) and found != list(theirs[1].values())


def test_fid_of_exactly_n_samples(place, shapes):
    row = call(calc_FID, prior_flags(shapes, "fid", "--n_samples 13 --kid --isc --save_images --save_latents"))
    assert row["values"]["samples"] == 13 and row["values"]["training_images"] == 40
    assert SmallExtractor.seen == 53
    saved = pngs(Path("logs/fid/samples"))
    assert len(saved) == 13

    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    extractor = SmallExtractor()
    real = extractor(pngs_at_16(shapes))[0]
    fake = extractor(saved.permute(0, 3, 1, 2))[0]
    expected = fid_statistics_to_metric(fid_features_to_statistics(real), fid_features_to_statistics(fake), False)
    assert row["values"]["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert math.isfinite(row["values"]["kid"]) and row["values"]["isc"] >= 1

    assert row["args"]["n_samples"] == 13 and row["metric"] == "calc_FID"
    assert sorted(row["versions"]) == ["Pillow", "torch-fidelity"] and "unknown" not in row["versions"].values()
    assert row["checkpoints"]["autoencoder"]["path"].endswith("vqgan_ema_4.th")
    assert len(row["checkpoints"]["sampler"]["hash"]) == 64

    SmallExtractor.seen = 0
    assert call(calc_FID, prior_flags(shapes, "fid", "--n_samples 13"))["values"]["fid"] == row["values"]["fid"]
    assert SmallExtractor.seen == 0, "what was saved is cached, too"

    ids = load_tensors("logs/fid/latents.pt")["ids"]
    assert ids.shape == (13, 16)
    again = call(calc_FID, prior_flags(shapes, "again", "--n_samples 13 --latents_path logs/fid/latents.pt"))
    assert again["values"]["fid"] == row["values"]["fid"]
    assert "sampler" not in again["checkpoints"]


def pngs_at_16(folder):
    from utils.data.decoding import decode

    return torch.stack([decode(p.read_bytes(), 16) for p in sorted(folder.glob("*.png"))])


def test_images_of_an_earlier_run_do_not_enter(place, shapes):
    flags = "--n_samples 5 --save_images"
    call(calc_FID, prior_flags(shapes, "fid", flags))
    with pytest.raises(UserError, match=r"logs/fid/samples holds images of an earlier run"):
        call(calc_FID, prior_flags(shapes, "fid", flags))
    assert len(list(Path("logs/fid/samples").iterdir())) == 5


def test_features_are_computed_once_for_all_that_they_depend_on(place, shapes):
    seen = []

    def fid(more=""):
        SmallExtractor.seen = 0
        row = call(calc_FID, prior_flags(shapes, "fid", ["--n_samples", "6", *more.split()]))
        seen.append(SmallExtractor.seen)
        return row["values"]["fid"]

    first = fid()
    assert fid() == first and fid("--batch_size 2 --feature_batch 4") == pytest.approx(first, rel=1e-3)
    assert fid("--seed 1") != first
    fid("--temp 0.5")
    fid("--sample_type mlm --sample_steps 4")
    fid("--sample_type mlm --sample_steps 4 --mask_schedule fixed")
    fid("--kid")  # wants the features of the training images, not their statistics alone
    fid()
    call(calc_PRDC, prior_flags(shapes, "prdc", "--n_samples 6 --nearest_k 2"))
    seen.append(SmallExtractor.seen)
    assert seen == [46, 0, 0, 6, 6, 6, 6, 40, 0, 6]


def test_a_place_that_takes_no_cache_is_no_error(place, shapes, capsys):
    Path("features").touch()  # as good as a read-only disk, also for root
    first = call(calc_FID, prior_flags(shapes, "fid", "--n_samples 4"))["values"]
    assert capsys.readouterr().out.count("features cannot be cached in features/") == 2
    Path("features").unlink()
    assert call(calc_FID, prior_flags(shapes, "fid", "--n_samples 4 --save_latents"))["values"] == first
    assert sorted(p.name.split("_")[0] for p in Path("features").iterdir()) == ["real", "samples"]


def test_validation_images_are_not_among_the_real_ones(place, shapes):
    from scripts import train_stage_2

    train_stage_2(shapes, "held_out", "ae", 4, "--train_steps 2 --steps_per_eval 2 --mask_schedule fixed")
    flags = prior_flags(shapes, "fid", "--n_samples 4 --load_dir held_out --load_step 2")
    row = call(calc_FID, flags)
    assert row["values"]["training_images"] == 38 and row["args"]["mask_schedule"] == "fixed"
    assert call(calc_FID, [*flags, "--steps_per_eval", "0"])["values"]["training_images"] == 40


def test_too_little_is_told_before_anything_is_sampled(place, shapes, tmp_path):
    few = draw_shapes(tmp_path / "few", 1)
    with pytest.raises(UserError, match="needs two training images or more, not 1"):
        call(calc_FID, prior_flags(few, "fid", "--n_samples 4"))
    with pytest.raises(UsageError, match="--n_samples 4 is too small for --nearest_k 3: 5 do"):
        call(calc_PRDC, prior_flags(shapes, "p", "--n_samples 4"))
    few = draw_shapes(tmp_path / "few", 4)
    with pytest.raises(UserError, match="4 images are too few for --nearest_k 3"):
        call(calc_PRDC, prior_flags(few, "p", "--n_samples 6"))
    assert SmallExtractor.seen == 0


def test_other_images_have_other_features(place, shapes, tmp_path):
    images = draw_shapes(tmp_path / "images", 24)
    first = call(calc_FID, prior_flags(images, "fid", "--n_samples 4"))
    draw_shapes(images, 24, seed=5)
    second = call(calc_FID, prior_flags(images, "fid", "--n_samples 4"))
    assert first["values"]["fid"] != second["values"]["fid"]
    (images / "0000.png").unlink()
    assert call(calc_FID, prior_flags(images, "fid", "--n_samples 4"))["values"]["training_images"] == 23


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (dict(ids=torch.zeros(3, 16, dtype=torch.int64)), "3 rows of codes; --n_samples 4"),
        (torch.zeros(4, 15, dtype=torch.int64), r"of shape \(N, 16\)\), but int64 of shape \(4, 15\)"),
        (torch.zeros(4, 16), r"no codes \(integers .* but float32 of shape \(4, 16\)"),
        ({}, "no codes .* but NoneType"),
        ("text", "no codes .* but str"),
        (torch.full((4, 16), 16), "outside 0 ... 15"),
        (torch.full((4, 16), -1), "outside 0 ... 15"),
    ],
)
def test_latents_that_do_not_fit(place, shapes, value, said):
    save_tensors("l.pt", value)
    with pytest.raises(UserError, match=said):
        call(calc_FID, prior_flags(shapes, "fid", "--n_samples 4 --latents_path l.pt"))


def test_latents_of_other_kinds(tmp_path, trained):
    H = type("H", (), dict(block_size=16, codebook_size=16, allow_other_ae=False))
    ids = torch.arange(64).view(4, 16) % 16
    expected = ids[:3]
    np.save(tmp_path / "l.npy", ids.view(4, 4, 4).numpy())
    save_tensors(tmp_path / "list.pt", [ids[:2], ids[2:]])
    names = [f"{kind}.npy" for kind in ("uint8", "uint16", "uint32", "uint64", "int16")]
    for name in names:
        np.save(tmp_path / name, ids.numpy().astype(name.removesuffix(".npy")))
    for name in ("l.npy", "list.pt", *names):
        assert torch.equal(measure.read_latents(tmp_path / name, 3, H, None), expected)
    np.save(tmp_path / "float.npy", ids.numpy().astype("float64"))
    with pytest.raises(UserError, match=r"float.npy holds no codes .* but float64 of shape \(4, 16\)"):
        measure.read_latents(tmp_path / "float.npy", 3, H, None)
    np.save(tmp_path / "large.npy", np.full((4, 16), 2**64 - 1, "uint64"))
    with pytest.raises(UserError, match="large.npy holds codes outside 0 ... 15"):
        measure.read_latents(tmp_path / "large.npy", 3, H, None)
    cache = next((trained / "latents").glob("custom_train_*.pt"))
    made_by = load_tensors(cache)["header"]["autoencoder"]
    assert measure.read_latents(cache, 40, H, Loaded(None, "ae", made_by)).shape == (40, 16)
    for path in (cache, tmp_path / "mine.pt"):
        measure.write_latents(tmp_path / "mine.pt", ids, Loaded(None, "ae", made_by))
        with pytest.raises(UserError, match=f"{path.name} holds the codes of another autoencoder than other"):
            measure.read_latents(path, 3, H, Loaded(None, "other", "0"))
    H.allow_other_ae = True
    assert len(measure.read_latents(cache, 3, H, Loaded(None, "other", "0"))) == 3


# ---------------------------------------------------------------------- PRDC


def test_prdc_of_samples_files_and_folders(place, shapes):
    flags = "--n_samples 20 --nearest_k 2 --real_feats r.npy --fake_feats f.pt"
    row = call(calc_PRDC, prior_flags(shapes, "prdc", flags))
    assert {"precision", "recall", "density", "coverage"} <= row["values"].keys()
    real, fake = (feature_files.read(name).features for name in ("r.npy", "f.pt"))
    assert len(real) == len(fake) == 20
    from prdc import compute_prdc

    expected = compute_prdc(real.numpy(), fake.numpy(), 2)
    assert {k: row["values"][k] for k in expected} == pytest.approx(expected, abs=1e-6)

    SmallExtractor.seen = 0
    assert call(calc_PRDC, prior_flags(shapes, "again", flags))["values"] == row["values"]
    assert SmallExtractor.seen == 0
    perfect = call(calc_PRDC, prior_flags(shapes, "self", ["--n_samples", "40", "--fake_images_path", str(shapes)]))
    assert perfect["values"]["precision"] == perfect["values"]["coverage"] == 1.0


def test_prdc_against_fewer_training_images(place, shapes, tmp_path, capsys):
    few = draw_shapes(tmp_path / "few", 9)
    flags = prior_flags(few, "prdc", "--n_samples 12 --real_feats r.npy")
    first = call(calc_PRDC, flags)["values"]
    assert first["training_images"] == 9 and len(np.load("r.npy")) == 9
    assert call(calc_PRDC, flags)["values"] == first, "what it has written it reads"
    assert capsys.readouterr().out.count("note: 9 training images are compared with 12 samples") == 2
    flags = prior_flags(shapes, "prdc", "--n_samples 12 --real_feats r.npy")  # of which there are more
    with pytest.raises(UserError, match="r.npy holds features of 9 images; 12 are asked for"):
        call(calc_PRDC, flags)


def test_prdc_of_files_alone_needs_no_model(place, shapes, capsys):
    for name in ("r.npy", "f.npy"):
        np.save(name, torch.randn(9, 5))
    flags = prior_flags(shapes, "prdc", "--n_samples 9 --real_feats r.npy --fake_feats f.npy")
    flags[flags.index("ae")] = "nowhere"
    flags = without_sampler(flags)
    row = call(calc_PRDC, flags)
    assert row["values"]["samples"] == 9 and row["checkpoints"] == {}
    digest = hashlib.sha256(Path("f.npy").read_bytes()).hexdigest()
    assert row["feature_files"]["fake_feats"] == dict(path="f.npy", sha256=digest, made_by=None)
    text = capsys.readouterr().out
    assert "features read from f.npy: the file does not state their origin" in text
    assert "note: no effect next to files of features: --sample_steps\n" in text
    with pytest.raises(UsageError, match=r"--real_feats r\.npy exists and contradicts --against reconstructions"):
        call(calc_PRDC, [*flags, "--against", "reconstructions"])


def without_sampler(flags):
    at = flags.index("--load_dir")  # and its step follows
    return [*flags[:at], *flags[at + 4 :]]


def test_prdc_refuses_features_of_other_samples(place, shapes, capsys):
    from scripts import train_stage_2

    def prdc(more="", n=20):
        flags = ["--n_samples", n, "--nearest_k", "2", "--fake_feats", "f.pt", *more.split()]
        return prior_flags(shapes, "prdc", flags)

    row = call(calc_PRDC, prdc())
    made = row["feature_files"]["fake_feats"]
    assert made["sha256"] == hashlib.sha256(Path("f.pt").read_bytes()).hexdigest()
    assert made["made_by"]["what"] == "20 samples of logs/prior/saved_models/absorbing_ema_3.th"
    train_stage_2(shapes, "other", "ae", 4, "--train_steps 2")
    SmallExtractor.seen = 0
    for more, named in (
        ("--temp 0.5", r"temp 1.0 \(here 0.5\)"),
        ("--seed 1", r"seed 0 \(here 1\)"),
        ("--load_dir other --load_step 2", r"sampler \w+ \(here \w+\)"),
        ("--amp", "precision"),
        (f"--fake_images_path {shapes}", r"kind samples \(here fake\)"),
    ):
        with pytest.raises(UsageError, match=rf"--fake_feats f.pt holds features of 20 samples of .*prior.*{named}"):
            call(calc_PRDC, prdc(more))
    assert SmallExtractor.seen == 0, "refused before anything is computed"
    assert call(calc_PRDC, prdc())["values"] == row["values"]
    capsys.readouterr()
    found = call(calc_PRDC, without_sampler(prdc("--seed 1")))  # which names no samples, so that the file decides
    assert found["values"] == row["values"] and found["feature_files"]["fake_feats"] == made
    text = capsys.readouterr().out
    assert f"features read from f.pt: {made['made_by']['what']}" in text and "features: --seed" in text
    few = call(calc_PRDC, prdc(n=12))["values"]  # the first samples are the same, however many follow
    Path("f.pt").unlink()
    assert call(calc_PRDC, prdc(n=12))["values"] == few


def test_prdc_refuses_features_of_other_images(place, shapes, tmp_path):
    def prdc(images, n=20):
        flags = ["--n_samples", n, "--fake_images_path", images, "--real_feats", "r.npy"]
        return without_sampler(prior_flags(images, "prdc", flags))

    row = call(calc_PRDC, prdc(shapes))
    assert call(calc_PRDC, prdc(shapes))["values"] == row["values"]
    SmallExtractor.seen = 0
    message = "--real_feats r.npy holds features of 20 training images of 'custom'.*images: "
    for flags in (prdc(draw_shapes(tmp_path / "others", 40, seed=1)), prdc(shapes, n=19)):
        with pytest.raises(UsageError, match=message):
            call(calc_PRDC, flags)
    assert SmallExtractor.seen == 0
    Path("r.npy").unlink()
    for grey in (50, 90):  # of the same names, sizes and times
        for i in range(20):
            path = tmp_path / "bmp" / f"{i}.bmp"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (16, 16), grey + i).save(path)
            os.utime(path, ns=(10**18,) * 2)
        if grey == 50:
            call(calc_PRDC, prdc(tmp_path / "bmp"))
    with pytest.raises(UsageError, match="20 training images of 'custom'.*images: contents"):
        call(calc_PRDC, prdc(tmp_path / "bmp"))


def test_prdc_refuses_features_of_different_networks(place, shapes, monkeypatch):
    flags = "--n_samples 20 --real_feats r.npy --fake_feats f.npy"
    call(calc_PRDC, prior_flags(shapes, "prdc", flags))
    Path("f.npy").unlink()
    monkeypatch.setattr(SmallExtractor, "identity", dict(extractor="means", weights="others"))
    with pytest.raises(UsageError, match=r"--real_feats r.npy .*weights none \(here others\)"):
        call(calc_PRDC, prior_flags(shapes, "prdc", flags))
    call(calc_PRDC, prior_flags(shapes, "prdc", "--n_samples 20 --fake_feats f.npy"))
    with pytest.raises(UsageError, match=r"different networks: weights others \(here none\)"):
        call(calc_PRDC, prior_flags(shapes, "prdc", flags))


def test_prdc_of_a_folder_with_a_broken_image(place, shapes, tmp_path, capsys):
    draw_shapes(tmp_path / "fake", 40)
    (tmp_path / "fake" / "0003.png").write_bytes(b"no image")
    flags = ["--n_samples", "40", "--fake_images_path", str(tmp_path / "fake"), "--fake_feats", "f.npy"]
    row = call(calc_PRDC, prior_flags(shapes, "prdc", flags))
    assert row["values"]["samples"] == 39 and "40 training images are compared with 39" in capsys.readouterr().out
    of_file = without_sampler(prior_flags(shapes, "prdc", flags[:2] + flags[4:]))
    assert call(calc_PRDC, of_file)["values"] == row["values"]


def test_the_autoencoder_says_how_large_images_are(place, shapes, capsys):
    flags = prior_flags(shapes, "p", ["--n_samples", "20", "--fake_images_path", str(shapes)])
    flags[flags.index("ae")] = "mistyped"
    with pytest.raises(SystemExit):
        call(calc_PRDC, flags)
    assert "--ae_load_dir mistyped: there is no folder logs/mistyped: logs/ holds" in capsys.readouterr().err
    flags = without_sampler(flags)
    with pytest.raises(UsageError, match="--ae_load_dir mistyped: there is no folder"):
        call(calc_PRDC, [*flags, "--ch_mult", "1", "1", "1", "1", "1"])
    assert call(calc_PRDC, [*flags, "--img_size", "16", "--ch_mult", "1", "1", "1"])["values"]["precision"] == 1


def test_prdc_with_too_little(place, shapes, tmp_path):
    with pytest.raises(UserError, match="holds 40 images; --n_samples 41"):
        call(calc_PRDC, prior_flags(shapes, "p", ["--n_samples", "41", "--fake_images_path", str(shapes)]))
    with pytest.raises(UserError, match="is not a folder"):
        call(calc_PRDC, prior_flags(shapes, "p", "--n_samples 9 --fake_images_path /no/such"))
    np.save("f.npy", torch.randn(5, 12))
    SmallExtractor.seen = 0
    with pytest.raises(UserError, match="features of 5 images; 9 are asked for"):
        call(calc_PRDC, prior_flags(shapes, "p", "--n_samples 9 --fake_feats f.npy"))
    assert SmallExtractor.seen == 0, "told before anything is computed"
    with pytest.raises(UsageError, match="contradicts --fake_images_path"):
        call(calc_PRDC, prior_flags(shapes, "p", "--n_samples 9 --fake_feats f.npy --fake_images_path ."))
    with pytest.raises(UserError, match="latents is a folder"):
        Path("latents").mkdir()
        call(calc_PRDC, prior_flags(shapes, "p", "--n_samples 9 --fake_feats latents"))


# ---------------------------------------------------------------------- the network that needs no download

EFFICIENT = "--extractor efficientnet_lite0"


def test_distances_by_another_network_have_other_names(place, shapes, capsys):
    row = call(calc_FID, prior_flags(shapes, "fid", f"--n_samples 6 --kid {EFFICIENT}"))
    names = {"fd_efficientnet_lite0", "kd_efficientnet_lite0", "kd_efficientnet_lite0_std"}
    assert row["values"].keys() == names | {"samples", "training_images"}
    assert row["values"]["fd_efficientnet_lite0"] > 0 and row["features"]["extractor"] == "efficientnet-lite0"
    out = capsys.readouterr().out
    assert "features of efficientnet_lite0" in out and not re.search(r"FID|KID|^ +[fk]id", out, re.MULTILINE)
    assert SmallExtractor.seen == 0
    before = len(list(Path(features.FEATURES).iterdir()))
    row = call(calc_PRDC, prior_flags(shapes, "prdc", f"--n_samples 6 {EFFICIENT}"))
    assert row["features"]["extractor"] == "efficientnet-lite0" and "coverage" in row["values"]
    assert len(list(Path(features.FEATURES).iterdir())) == before + 1, "the samples were cached"
    assert "fid" in call(calc_FID, prior_flags(shapes, "fid", "--n_samples 6"))["values"] and SmallExtractor.seen > 0


def test_reconstructions_by_another_network(place, shapes, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(place))
    monkeypatch.setattr(features, "Inception", Inception)
    flags = vqgan_flags(shapes, "rfid", f"--ae_load_dir ae --ae_load_step 4 --n_samples 5 {EFFICIENT}")
    values = call(calc_VQGAN_FID, flags)["values"]
    assert values["rfd_efficientnet_lite0"] > 0 and 0 < values["perceptual_efficientnet_lite0"] < 4
    assert not {"rfid", "lpips"} & values.keys() and "left out" not in capsys.readouterr().out


def test_missing_inception_names_the_other_network(place, shapes, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(place))
    monkeypatch.setattr(features, "Inception", Inception)
    for script in (calc_FID, calc_PRDC):
        with pytest.raises(UserError, match=f"needs no download: {EFFICIENT}$"):
            call(script, prior_flags(shapes, "fid", "--n_samples 6"))


def test_an_inception_score_of_another_network_is_refused(place, shapes, capsys):
    with pytest.raises(SystemExit) as stop:
        call(calc_FID, prior_flags(shapes, "fid", f"--n_samples 6 --isc {EFFICIENT}"))
    assert stop.value.code == 2 and "--isc contradicts --extractor" in capsys.readouterr().err


# ---------------------------------------------------------------------- reconstructions


@pytest.mark.parametrize("how", ["--ae_load_dir ae --ae_load_step 4", "--load_dir ae --load_step 4"])
def test_reconstructions(place, shapes, how, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(place))
    row = call(calc_VQGAN_FID, vqgan_flags(shapes, "rfid", f"{how} --n_samples 7 --save_images"))
    saved = pngs(Path("logs/rfid/reconstructions")).permute(0, 3, 1, 2).float() / 255
    from utils.data.images import evenly_spaced

    originals = pngs_at_16(shapes)[evenly_spaced(7, 40)].float() / 255
    mse = (saved - originals).square().flatten(1).mean(1)
    assert row["values"]["l1"] == pytest.approx((saved - originals).abs().mean().item(), rel=1e-5)
    assert row["values"]["psnr"] == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-5)
    assert row["values"]["images"] == 7 and row["values"]["rfid"] > 0 and "lpips" not in row["values"]
    assert 1 <= row["values"]["codes_used"] <= 16 and 1 <= row["values"]["perplexity"] <= 16
    assert Path("logs/rfid/images/reconstructions.png").is_file()


def test_reconstructions_without_the_weights_of_inception(place, shapes, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(place))
    flags = vqgan_flags(shapes, "rfid", "--ae_load_dir ae --ae_load_step 4 --n_samples 7")
    complete = call(calc_VQGAN_FID, flags)
    assert complete["values"].pop("rfid") > 0 and "rFID is left out" not in capsys.readouterr().out
    monkeypatch.setattr(features, "Inception", Inception)
    (place / "features").rename(place / "away")
    row = call(calc_VQGAN_FID, flags)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note[:24] for note in notes] == ["note: rFID is left out: ", "note: LPIPS is left out:"]
    assert "python experiments/get_weights.py inception" in notes[0] and "get_weights.py vgg" in notes[1]
    assert row["values"] == complete["values"] and row["features"] is None
    assert not (place / "features").exists()
    with pytest.raises(UserError, match="/no/such does not exist"):
        call(calc_VQGAN_FID, [*flags, "--feature_weights", "/no/such"])
    bad = Path(WEIGHT_FILES["inception"].place)
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"damaged")
    with pytest.raises(DamagedFile, match="damaged"):
        call(calc_VQGAN_FID, flags)
    calc_VQGAN_FID.dry_run(experiment(calc_VQGAN_FID, flags))
    out = capsys.readouterr().out
    assert "Inception weights are missing" not in out and "VGG16 weights for LPIPS are missing" in out


def test_reconstructions_of_the_validation_split(place, shapes):
    flags = "--ae_load_dir ae --ae_load_step 4 --split val"
    assert call(calc_VQGAN_FID, vqgan_flags(shapes, "rfid", flags))["values"]["images"] == 2


def test_the_smallest_images(place, tmp_path, monkeypatch):
    """No discriminator of the default depth would fit them, but none is needed; LPIPS takes them enlarged."""
    from scripts import train_stage_1

    images = draw_shapes(tmp_path / "images", 4)
    train_stage_1(images, "small", "--train_steps 1 --img_size 8")
    torch.manual_seed(0)
    lpips = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    monkeypatch.setattr(calc_VQGAN_FID, "load_lpips", lambda *_: lpips)
    more = "--img_size 8 --ae_load_dir small --ae_load_step 1 --disc_layers 3 --save_images"
    flags = vqgan_flags(images, "rfid", more)
    row = call(calc_VQGAN_FID, flags)
    saved = pngs(Path("logs/rfid/reconstructions")).permute(0, 3, 1, 2).float() / 255
    from utils.data.decoding import decode

    originals = torch.stack([decode(p.read_bytes(), 8) for p in sorted(images.glob("*.png"))]).float() / 255
    large = [2 * x.repeat_interleave(4, 2).repeat_interleave(4, 3) - 1 for x in (originals, saved)]
    assert row["values"]["lpips"] == pytest.approx(lpips(*large).mean().item(), rel=1e-4)
    calc_VQGAN_FID.dry_run(experiment(calc_VQGAN_FID, flags))


def test_a_vqgan_must_be_named(place, shapes, capsys):
    with pytest.raises(SystemExit):
        call(calc_VQGAN_FID, vqgan_flags(shapes, "rfid"))
    assert "give the VQGAN with --ae_load_dir" in capsys.readouterr().err


# ---------------------------------------------------------------------- likelihood


def elbo_flags(shapes, more="", sampler="absorbing"):
    return prior_flags(shapes, "elbo", f"--train_steps 6 --steps_per_eval 3 --lr 1e-2 {more}", sampler)


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_the_likelihood_of_validation_images(place, shapes, sampler):
    row = call(calc_approximate_ELBO, elbo_flags(shapes, "", sampler))
    rows = [json.loads(line) for line in Path("logs/elbo/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [3, 6] and row["images"] == 2
    first, last = (r["values"] for r in rows)
    assert last["nats_x"] < first["nats_x"] and last["nats_z"] == first["nats_z"]
    dims = 3 * 16 * 16
    assert last["nats"] == pytest.approx(last["nats_x"] + last["nats_z"])
    assert last["bits_per_dim"] == pytest.approx((last["nats"] + math.log(32) * dims) / (dims * math.log(2)))
    assert last["bits_per_code"] == pytest.approx(last["nats_z"] / (16 * math.log(2)))
    assert last["bits_per_dim_se"] > 0


def test_a_finished_fit_is_only_evaluated(place, shapes):
    five = call(calc_approximate_ELBO, elbo_flags(shapes))["values"]
    fitted = Path("logs/elbo/saved_models/logsigma_6.th").read_bytes()
    eight = call(calc_approximate_ELBO, elbo_flags(shapes, "--resume --n_bits 8 --elbo_passes 4"))["values"]
    assert eight["nats_x"] == pytest.approx(five["nats_x"]) and eight["nats_z"] != five["nats_z"]
    assert eight["bits_per_dim"] - five["bits_per_dim"] == pytest.approx(3, abs=0.05)
    assert Path("logs/elbo/saved_models/logsigma_6.th").read_bytes() == fitted
    with pytest.raises(UserError, match="--resume continues it"):
        call(calc_approximate_ELBO, elbo_flags(shapes))


def test_one_image_has_no_standard_error(place, shapes):
    row = call(calc_approximate_ELBO, elbo_flags(shapes, "--elbo_images 1"))
    assert row["images"] == 1 and row["values"]["bits_per_dim_se"] is None


def test_a_fit_that_has_nothing_to_resume_is_an_ordinary_one(place, shapes, monkeypatch):
    monkeypatch.setattr(calc_approximate_ELBO, "FIT_STEPS", 2)
    flags = prior_flags(shapes, "elbo", "--resume")
    lr = flags.index("--lr")
    row = call(calc_approximate_ELBO, flags[:lr] + flags[lr + 2 :])
    assert row["step"] == row["args"]["train_steps"] == 2 and row["args"]["lr"] == calc_approximate_ELBO.FIT_LR


def test_a_fit_goes_on_with_another_rate_and_another_sampler(place, shapes):
    from scripts import train_stage_2

    train_stage_2(shapes, "other", "ae", 4, "--train_steps 2 --bert_n_layers 1 --mask_schedule fixed")
    call(calc_approximate_ELBO, elbo_flags(shapes))
    flags = elbo_flags(shapes, "--resume --train_steps 8 --lr 0.02 --load_dir other --load_step 2")
    layers = flags.index("--bert_n_layers")
    row = call(calc_approximate_ELBO, flags[:layers] + flags[layers + 2 :])
    assert load_tensors("logs/elbo/saved_models/logsigma_optim_8.th")["param_groups"][0]["lr"] == 0.02
    assert row["args"]["mask_schedule"] == "fixed" and row["args"]["bert_n_layers"] == 1


def test_a_fit_goes_on_with_its_own_autoencoder_only(place, shapes):
    from scripts import train_stage_1

    call(calc_approximate_ELBO, elbo_flags(shapes))
    train_stage_1(shapes, "other", "--train_steps 4 --seed 1")
    more = "--resume --ae_load_dir other --allow_other_ae"
    with pytest.raises(UserError, match=r"logs/elbo was trained with .*vqgan_ema_4.th, which is not .*other"):
        call(calc_approximate_ELBO, elbo_flags(shapes, more))


def test_a_run_of_another_script_is_left_alone(place, shapes, capsys):
    from scripts import train_stage_2

    train_stage_2(shapes, "run", "ae", 4, "--train_steps 2")
    config = Path("logs/run/config.json").read_text()
    with pytest.raises(SystemExit):
        call(calc_approximate_ELBO, prior_flags(shapes, "run", "--resume --train_steps 2 --lr 1e-3"))
    assert "logs/run holds a training run: give another --log_dir" in capsys.readouterr().err
    assert Path("logs/run/config.json").read_text() == config


def test_nothing_but_logsigma_is_fitted(place, shapes):
    call(calc_approximate_ELBO, elbo_flags(shapes))
    before = load_tensors("logs/ae/saved_models/vqgan_ema_4.th")
    after = load_tensors("logs/elbo/saved_models/logsigma_6.th")
    assert all(not torch.equal(v, before[f"ae.generator.logsigma.{k}"]) for k, v in after.items())
    assert {p.name.split("_")[0] for p in Path("logs/elbo/saved_models").iterdir()} == {"logsigma", "manifest"}


# ---------------------------------------------------------------------- samples


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_samples_do_not_depend_on_the_batch(place, shapes, sampler):
    flags = "--n_samples 9 --save_latents --batch_size"
    ids = []
    for size in (9, 4, 1):
        call(get_samples, prior_flags(shapes, f"s{size}", f"{flags} {size}", sampler))
        ids.append(load_tensors(f"logs/s{size}/latents.pt")["ids"])
    call(get_samples, prior_flags(shapes, "later", f"{flags} 9 --first_sample 5", sampler))
    ids.append(torch.cat((ids[0][:5], load_tensors("logs/later/latents.pt")["ids"][:4])))
    for other in ids[1:]:
        assert torch.equal(other, ids[0])
    assert len(list(Path("logs/s9/images").iterdir())) == 9


def test_a_sample_is_what_its_codes_decode_to(place, shapes):
    call(get_samples, prior_flags(shapes, "s", "--n_sheets 2 --save_individually --save_latents"))
    assert len(list(Path("logs/s/images").iterdir())) == 50
    row = json.loads(Path("logs/s/metrics.jsonl").read_text())
    assert row["values"]["samples"] == 50 and row["metric"] == "get_samples"
    H = experiment(get_samples, prior_flags(shapes, "x"))
    models = load_models(H)
    ids = load_tensors("logs/s/latents.pt")["ids"]
    decoded = to_uint8(models.autoencoder.model.decode(ids[7:8], 4, 4))[0].permute(1, 2, 0).int()
    saved = torch.from_numpy(np.array(Image.open("logs/s/images/sample_7.png")))
    assert (saved - decoded).abs().max() <= 1


def pixels(name):
    return np.array(Image.open(f"logs/s/images/{name}"))


def test_another_command_line_does_not_overwrite_pictures(place, shapes, capsys):
    flags = "--n_sheets 1 --show_steps"
    for more in ("", "--temp 0.5", "--seed 8"):
        call(get_samples, prior_flags(shapes, "s", f"{flags} {more}"))
    out = capsys.readouterr().out
    assert "samples_0-24.png was drawn by another command and stays; this one draws logs/s/images/samples_0-24.2" in out
    files = sorted(path.name for path in Path("logs/s/images").iterdir())
    stems = [f"{name}{number}" for name in ("denoising_0", "samples_0-24") for number in ("", ".2", ".3")]
    assert files == sorted([f"{s}.png" for s in stems] + [f"{s}.gif" for s in stems if "denoising" in s])
    found = [pixels(f"samples_0-24{number}.png") for number in ("", ".2", ".3")]
    assert len({x.tobytes() for x in found}) == 3
    call(get_samples, prior_flags(shapes, "s", f"--temp 0.5 {flags} --batch_size 8 --visdom_port 8099"))
    assert sorted(path.name for path in Path("logs/s/images").iterdir()) == files, "the same command draws them again"
    assert "another command" in capsys.readouterr().out
    call(get_samples, prior_flags(shapes, "s", f"{flags} --first_sample 25"))
    assert Path("logs/s/images/samples_25-49.png").is_file(), "no other picture has this name"


def test_pictures_of_unknown_origin_stay(place, shapes):
    """Of earlier versions, or beside a damaged record."""
    Path("logs/s/images").mkdir(parents=True)
    Path("logs/s/images/sample_0.png").write_bytes(b"mine")
    Path("logs/s/pictures.jsonl").write_bytes(b'\xff\n[1]\n{"picture": 3}\n')
    for _ in range(2):
        call(get_samples, prior_flags(shapes, "s", "--n_samples 1"))
    assert sorted(path.name for path in Path("logs/s/images").iterdir()) == ["sample_0.2.png", "sample_0.png"]
    assert Path("logs/s/images/sample_0.png").read_bytes() == b"mine"


def test_samples_of_custom_need_no_folder(place):
    words = prior_flags("nowhere", "s", "--n_samples 1")
    at = words.index("--custom_dataset_path")
    assert call(get_samples, [*words[:at], *words[at + 2 :]])["values"]["samples"] == 1


@pytest.mark.parametrize("script", [get_samples, calc_FID])
def test_another_data_set_than_the_models_is_reported(script, place, shapes, capsys):
    words = prior_flags(shapes, "s", "--n_samples 2")
    call(script, words)
    assert "warning" not in capsys.readouterr().out
    other = draw_shapes(place / "other", 8)
    at = words.index("--custom_dataset_path")
    call(script, [*words[: at + 1], str(other), *words[at + 2 :]])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert line == (
        f"warning: logs/prior was trained on the data set 'custom' ({shapes}), and --dataset names 'custom' ({other})"
    )


# ---------------------------------------------------------------------- models that do not belong together


def test_a_sampler_of_another_autoencoder_is_refused(place, shapes):
    from scripts import train_stage_1

    train_stage_1(shapes, "other", "--train_steps 4 --seed 1")
    flags = prior_flags(shapes, "fid", "--n_samples 4 --ae_load_dir other")
    with pytest.raises(UserError, match=r"logs/prior \(step 3\).*ema_4.th, which is not .*other.*--allow_other_ae"):
        call(calc_FID, flags)
    assert call(calc_FID, [*flags, "--allow_other_ae"])["values"]["samples"] == 4


def test_a_missing_checkpoint_lists_those_that_exist(place, shapes):
    with pytest.raises(UserError, match="absorbing_9.th does not exist; steps of 'absorbing' in .*: 3"):
        call(calc_FID, prior_flags(shapes, "fid", "--n_samples 4 --load_step 9"))
    with pytest.raises(UserError, match="vqgan_9.th does not exist; steps of 'vqgan' in .*: 4"):
        call(calc_FID, prior_flags(shapes, "fid", "--n_samples 4 --ae_load_step 9"))


def test_a_cache_that_is_damaged_is_computed_again(place, shapes, capsys):
    first = call(calc_FID, prior_flags(shapes, "fid", "--n_samples 4"))["values"]
    for path in Path(features.FEATURES).iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    assert call(calc_FID, prior_flags(shapes, "fid", "--n_samples 4"))["values"] == first
    assert capsys.readouterr().out.count("computed again") == 2
