"""The steps of models that a command line leaves open, and what it takes from the models to describe them."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT
from test_hparams import SAMPLER, datasets, refused, resolved, save_run

from experiments.calc_FID import FIDConfig
from hparams import get_hparams
from hparams.config import names_of
from utils.core.files import hash_json

OPEN = "--sampler absorbing --ae_load_dir ae"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets((ROOT / "datasets.yaml").read_text())


def weights(folder, step, name="vqgan", size=3):
    path = Path("logs", folder, "saved_models", f"{name}_{step}.th")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def checkpoint(folder, step, name="vqgan", hparams=None):
    """What utils/core/checkpoint.py writes, except that the weights are none."""
    weights(folder, step, name)
    files = {f"saved_models/{name}_{step}.th": dict(bytes=3, sha256="")}
    manifest = dict(step=step, hparams=hparams or {}, files=files)
    text = json.dumps(dict(manifest, digest=hash_json(manifest)))
    Path("logs", folder, "saved_models", f"manifest_{step}.json").write_text(text)


def measured(words):
    return get_hparams(
        "sampler", "", f"--dataset churches --n_samples 2 {words}".split(), extra=(FIDConfig,), script="calc_FID"
    )


def test_the_newest_complete_step_is_taken_and_printed(capsys):
    for step in (2, 900, 1000):
        checkpoint("ae", step)
    weights("ae", 1000, size=2)  # shorter than its manifest says
    weights("ae", 2000)  # being written
    H = resolved(OPEN, "sampler")
    assert H.ae_load_step == H.to_dict()["ae_load_step"] == 900
    assert capsys.readouterr().err == "note: --ae_load_step 900: the newest complete step of 'vqgan' in logs/ae\n"
    assert resolved(f"{OPEN} --ae_load_step 2", "sampler").ae_load_step == 2
    assert capsys.readouterr().err == ""


def test_of_a_published_folder_the_largest_step(capsys):
    for step in (90, 1000):
        weights("ae", step, "vqgan_ema")
    weights("ae", 3000, "ae_optim")
    weights("ae", 2000)
    Path("logs/ae/saved_models/.unfinished_2000.json").touch()
    assert resolved(OPEN, "sampler").ae_load_step == 1000


def test_without_a_step_there_must_be_one():
    os.makedirs("logs/ae/saved_models")
    assert refused(OPEN, "sampler").endswith("--ae_load_dir ae: logs/ae holds no complete checkpoint of 'vqgan'")
    assert "did you mean ae?" in refused("--sampler absorbing --ae_load_dir aes", "sampler")
    assert resolved(f"{OPEN} --dry_run", "sampler").ae_load_step is None  # it needs only the shapes
    weights("prior", 4, "absorbing")
    line = refused("--sampler autoregressive --ae_load_dir prior", "sampler")
    assert "no complete checkpoint of 'vqgan'" in line


def test_scripts_that_measure_take_the_newest_step_of_the_sampler(capsys):
    checkpoint("ae", 5)
    checkpoint("prior", 3, "absorbing")
    checkpoint("prior", 7, "autoregressive")
    H = measured(f"{OPEN} --load_dir prior")
    assert (H.ae_load_step, H.load_step) == (5, 3)
    assert "--load_step 3: the newest complete step of 'absorbing' in logs/prior" in capsys.readouterr().err
    assert measured(f"{OPEN} --load_dir prior --load_step 2").load_step == 2
    assert measured(OPEN).load_step == 0  # no sampler is named


def test_training_must_be_told_where_to_begin():
    for step in (2, 40):
        checkpoint("old", step)
    line = refused("--load_dir old")
    assert "--load_dir old needs --load_step" in line and line.endswith("steps of 'vqgan' in logs/old: 40 2")
    assert resolved("--load_dir old --load_step 0").load_step == 0
    assert "did you mean old?" in refused("--load_dir olds")
    save_run("run", resolved("--load_dir old --load_step 2"))
    checkpoint("run", 50, hparams=json.loads(Path("logs/run/config.json").read_text())["hparams"])
    H = resolved("--log_dir run --resume --load_dir old")
    assert (H.load_dir, H.load_step) == ("old", 2)
    assert "--load_dir other contradicts --resume: logs/run began at step 2 of old" in refused(
        "--log_dir run --resume --load_dir other"
    )


def test_a_resumed_run_keeps_its_steps(capsys):
    checkpoint("ae", 5)
    save_run("run", resolved(OPEN, "sampler"))
    checkpoint("ae", 6)
    capsys.readouterr()
    H = resolved(f"{OPEN} --log_dir run --resume", "sampler")
    assert H.ae_load_step == 5 and "--ae_load_step 5: recorded by logs/run" in capsys.readouterr().err
    assert resolved(f"{OPEN} --log_dir other --resume", "sampler").ae_load_step == 6


# ---------------------------------------------------------------------- what describes the models


def test_what_a_script_ignores_is_as_the_models_were_trained():
    save_run("ae", resolved("--perceptual_weight 0 --ndf 16 --lr 0.5 --ema --train_steps 5"))
    save_run("prior", resolved("--lr 0.25 --train_steps 7 --warmup_iters 3 --ema --batch_size 9 --seed 4", "sampler"))
    H = measured(f"{SAMPLER} --load_dir prior --load_step 1 --train_steps 8")
    assert (H.lr, H.train_steps, H.warmup_iters, H.ema, H.perceptual_weight, H.ndf) == (0.25, 7, 3, True, 0.0, 16)
    assert (H.batch_size, H.seed, H.resume, H.log_dir) == (20, 0, False, "test"), "its own"
    assert H.known()["lr"] == 0.25 and not {"resume", "load_optim"} & H.known().keys()


def test_what_a_published_model_does_not_record_is_left_out():
    os.makedirs("logs/ae")
    os.makedirs("logs/prior")
    H = measured(f"{SAMPLER} --load_dir prior --load_step 1")
    assert not {"lr", "train_steps", "ema", "perceptual_weight", "ndf"} & H.known().keys()
    assert {"bert_n_emb", "codebook_size", "batch_size", "ae_load_step"} <= H.known().keys()


# ---------------------------------------------------------------------- what printed commands repeat


def test_a_resumed_run_repeats_what_it_began_with():
    given = "--amp --ema --steps_per_eval 7 --num_workers 61"
    first = resolved(given)
    save_run("run", first)
    resumed = resolved("--log_dir run --resume")
    again = resumed.repeated("machine", "dashboard", "stages")
    assert again == first.repeated("machine", "dashboard", "stages")
    assert again == dict(amp=True, ema=True, steps_per_eval=7, num_workers=61)
    assert resolved("").repeated("machine", "dashboard", "stages") == {}
    os.makedirs("logs/ae")
    save_run("prior", resolved("--temp 0.5", "sampler"))
    assert resolved("--log_dir prior --resume", "sampler").repeated("sampling") == dict(temp=0.5)


def test_a_switch_that_is_off_against_the_data_sets_default_is_repeated():
    assert resolved("--no_ema", dataset="demo").repeated("stages") == dict(no_ema=True)
    datasets("mine: {paths: x, hparams: {no_visdom: true}}")
    assert resolved("--visdom", dataset="mine").repeated("dashboard") == dict(visdom=True)
    assert "no_visdom" in names_of("dashboard")
