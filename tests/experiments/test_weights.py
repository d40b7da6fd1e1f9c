"""--weights: the averaged or the raw weights of a model, and which autoencoder goes with a sampler."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from scripts import experiment, prior_flags, train_stage_1, train_stage_2, vqgan_flags

from experiments import calc_FID, calc_VQGAN_FID, get_samples
from experiments.common.measure import Samples
from experiments.common.models import load_models
from utils.core.files import load_tensors, read_json
from utils.evaluation.features import cache_path


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of the trained models, as the current folder."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(models):
    return [Path(m.path).name for m in (models.autoencoder, models.sampler) if m]


def test_the_samplers_weights_are_chosen_and_its_autoencoder_stays(place, shapes):
    found = {}
    for weights in ("", "--weights ema", "--weights raw"):
        H = experiment(calc_FID, prior_flags(shapes, "fid", f"--n_samples 4 {weights}"))
        models = load_models(H)
        header = Samples(H, models, 4).header()
        found[weights] = names(models), cache_path(dict(**header))
    assert found[""] == found["--weights ema"] and found[""][0] == ["vqgan_ema_4.th", "absorbing_ema_3.th"]
    assert found["--weights raw"][0] == ["vqgan_ema_4.th", "absorbing_3.th"]
    assert found["--weights raw"][1] != found[""][1], "its cached features are others"


def test_the_results_state_which_weights_were_used(place, shapes):
    get_samples.main(experiment(get_samples, prior_flags(shapes, "s", "--n_samples 1 --weights raw")))
    row = json.loads(Path("logs/s/metrics.jsonl").read_text())
    assert row["args"]["weights"] == "raw"
    assert row["checkpoints"]["sampler"]["path"] == "logs/prior/saved_models/absorbing_3.th"


def test_a_sampler_of_raw_codes_keeps_its_autoencoder(place, shapes, capsys):
    """A new run of stage 2 chooses the VQGAN's weights; from then on the manifest of the run decides."""
    more = "--train_steps 2 --ema --steps_per_update_ema 1"
    train_stage_2(shapes, "raw", "ae", 4, f"{more} --weights raw")
    train_stage_2(shapes, "raw", "ae", 4, "--train_steps 3 --resume")
    manifest = read_json("logs/raw/saved_models/manifest_3.json")
    assert (
        manifest["autoencoder"]["path"] == "logs/ae/saved_models/vqgan_4.th" and manifest["hparams"]["weights"] == "raw"
    )
    with pytest.raises(SystemExit):
        train_stage_2(shapes, "raw", "ae", 4, "--train_steps 4 --resume --weights ema")
    assert "--weights ema contradicts --resume, which was trained with --weights raw" in capsys.readouterr().err
    H = experiment(calc_FID, prior_flags(shapes, "fid", "--n_samples 4 --load_dir raw --load_step 3"))
    assert names(load_models(H)) == ["vqgan_4.th", "absorbing_ema_3.th"]
    train_stage_2(shapes, "tuned", "ae", 4, f"--load_dir raw --load_step 3 {more} --train_steps 5")
    assert read_json("logs/tuned/saved_models/manifest_5.json")["autoencoder"]["path"].endswith("/vqgan_4.th")


def test_the_weights_of_a_vqgan(place, shapes):
    for weights, name in (("ema", "vqgan_ema_4.th"), ("raw", "vqgan_4.th")):
        flags = vqgan_flags(shapes, "rec", f"--ae_load_dir ae --ae_load_step 4 --weights {weights}")
        assert names(load_models(experiment(calc_VQGAN_FID, flags), with_sampler=False)) == [name]


def test_training_on_from_raw_weights_starts_the_averages_there(place, shapes):
    more = "--load_dir ae --load_step 4 --train_steps 5 --ema --steps_per_update_ema 100"
    for log_dir, weights, source in (("a", "ema", "vqgan_ema_4"), ("b", "raw", "vqgan_4")):
        train_stage_1(shapes, log_dir, f"{more} --weights {weights}")
        averaged = load_tensors(f"logs/{log_dir}/saved_models/vqgan_ema_5.th")
        begun = load_tensors(f"logs/ae/saved_models/{source}.th")
        key = "ae.generator.blocks.0.weight"
        assert torch.equal(averaged[key], begun[key])
