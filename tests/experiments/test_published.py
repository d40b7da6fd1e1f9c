"""The commands of docs/sampling.md for published checkpoints, on files of the published layout: state dicts alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, words
from scripts import experiment
from test_metrics import SmallExtractor

from experiments import calc_FID, calc_PRDC, calc_VQGAN_FID, get_samples
from utils.evaluation import features

SECTION = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8").split("\n## ")[2]
COMMANDS = re.findall(r"^python experiments/(\w+)\.py (--.*)$", SECTION, re.MULTILINE)
SCRIPTS = {module.__name__.split(".")[-1]: module for module in (get_samples, calc_FID, calc_PRDC, calc_VQGAN_FID)}
DATA_SETS = ("churches", "bedrooms", "ffhq")
# The models here are small. Published files do not state their shapes: these are the defaults.
SHAPES = "--img_size 16 --nf 32 --ch_mult 1 1 1 --res_blocks 1 --emb_dim 8 --codebook_size 16"
SAMPLER_SHAPES = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 2 --total_steps 16 --sample_steps 16"
HERE = "--batch_size 8 --num_workers 0 --no_visdom --device cpu"


@pytest.fixture
def published(trained, tmp_path, monkeypatch):
    """The current folder, with the files that the section names, and no data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    shutil.copy(ROOT / "datasets.yaml", tmp_path)
    named = re.findall(r"`(logs/\S+\.th)`", SECTION)
    assert len(named) == 6
    for path in map(Path, named):
        path.parent.mkdir(parents=True)
        own = "ae/saved_models/vqgan_ema_4.th" if "vqgan" in path.name else "prior/saved_models/absorbing_ema_3.th"
        shutil.copy(trained / "logs" / own, path)


def test_the_section_has_commands_for_each_data_set():
    found = [(script, re.search(r"--dataset (\w+)", text)[1]) for script, text in COMMANDS]
    assert sorted(found) == sorted((script, name) for script in SCRIPTS for name in DATA_SETS)


@pytest.mark.parametrize(("script", "text"), COMMANDS, ids=lambda value: value.split(" --log_dir")[0])
def test_a_command_works(script, text, published, shapes, monkeypatch):
    module = SCRIPTS[script]
    more = f"{SHAPES} {HERE}" if script == "calc_VQGAN_FID" else f"{SHAPES} {SAMPLER_SHAPES} {HERE}"
    if script != "get_samples":  # the others read images, and compare fewer here
        Path("datasets.yaml").write_text(json.dumps({name: {"paths": str(shapes)} for name in DATA_SETS}))
        monkeypatch.setattr(features, "Inception", SmallExtractor)
        more += " --n_samples 8"
    H = experiment(module, [*text.split(), *words(more)])
    module.main(H)
    (row,) = map(json.loads, Path("logs", H.log_dir, "metrics.jsonl").read_text().splitlines())
    used = {name: about["path"] for name, about in row["checkpoints"].items()}
    wanted = dict(autoencoder=f"logs/{H.ae_load_dir}/saved_models/vqgan_ema_{H.ae_load_step}.th")
    if script != "calc_VQGAN_FID":
        wanted["sampler"] = f"logs/{H.load_dir}/saved_models/absorbing_ema_{H.load_step}.th"
    assert used == wanted
    if script == "get_samples":
        assert (Path("logs") / H.log_dir / "images" / "samples_0-24.png").is_file()
