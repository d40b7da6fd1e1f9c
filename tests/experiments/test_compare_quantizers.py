"""The comparison of quantizers: its arithmetic, its command lines, and a comparison that is killed."""

import json
import math
import os
import shlex
import signal
import time

import pytest
from conftest import words
from PIL import Image
from scripts import experiment, run, start, vqgan_flags

from experiments import compare_quantizers
from experiments.compare_quantizers import (
    COLUMNS,
    best_of,
    check_settings,
    commands_of,
    lines_of,
    recommended,
    summarised,
)
from hparams import get_hparams
from hparams.config import QUANTIZERS
from utils.core.errors import UserError

SCRIPT = "experiments/compare_quantizers.py"


def configuration(images, more=""):
    return experiment(compare_quantizers, vqgan_flags(images, "compared", more))


def cell(**values):
    return {name: values.get(name, 1.0) for name in COLUMNS}


def test_means_and_standard_errors():
    row = summarised([cell(l1=value) for value in (1.0, 2.0, 4.0)])
    assert row["l1"] == pytest.approx(7 / 3)
    variance = ((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2
    assert row["l1_se"] == pytest.approx(math.sqrt(variance / 3)) and row["psnr_se"] == 0
    assert "l1_se" not in summarised([cell(l1=1.0)])
    lines = lines_of({"ema": row, "fsq": summarised([cell(l1=10.0)])})
    assert "2.3333 +- 0.8819" in lines["ema"] and "10.0000 " in lines["fsq"]
    starts = [line.index(text) for line, text in zip(lines.values(), ("L1", "2.3333", "10.0000"), strict=True)]
    assert len(set(starts)) == 1, "columns"


def test_the_fewest_bits_among_the_lowest_distortion_are_recommended():
    def row(l1, se, bits):
        return dict(l1=l1, l1_se=se, bits_per_picture=bits)

    table = dict(a=row(0.10, 0.01, 300), b=row(0.12, 0.01, 200), c=row(0.2, 0.01, 100))
    assert best_of(table) == "b", "0.02 is less than 2 x 0.014"
    assert best_of({name: dict(values, l1_se=0.005) for name, values in table.items()}) == "a"
    assert best_of({name: {k: v for k, v in values.items() if k != "l1_se"} for name, values in table.items()}) == "a"


def test_command_lines_are_those_of_the_scripts(tmp_path, shapes, monkeypatch):
    """Each is understood by its script, and has what was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs/compared/ema_7/vqgan").mkdir(parents=True)
    H = configuration(shapes, "--preset small --seed 7 --train_steps 400 --no_horizontal_flip --lecam_weight 0.1")
    assert H.quantizers == list(QUANTIZERS) and H.seeds == 3
    one, measures, prior = [shlex.split(line)[2:] for _, _, _, line in commands_of(H, "ema", 7)]
    stage_1 = get_hparams("vqgan", "", one)
    assert (stage_1.quantizer, stage_1.seed, stage_1.train_steps, stage_1.preset) == ("ema", 7, 400, "small")
    assert (stage_1.ch_mult, stage_1.lecam_weight, stage_1.horizontal_flip) == ([1, 1, 1], 0.1, False)
    assert stage_1.steps_per_eval == 50 and stage_1.steps_per_checkpoint == 50
    assert "--no_horizontal_flip" in prior and "--lecam_weight" not in prior and "--lecam_weight" not in measures
    assert measures[measures.index("--ae_load_dir") + 1] == prior[prior.index("--ae_load_dir") + 1] == stage_1.log_dir
    pasted = get_hparams("vqgan", "", shlex.split(recommended(H, "fsq"))[2:])
    assert (pasted.quantizer, pasted.train_steps, pasted.seed) == ("fsq", 4000, 0)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--quantizer ema", "--quantizers"),
        ("--quantizers magic", "magic"),
        ("--load_dir x --load_step 3", "--load_step"),
        ("--seeds 0", "--seeds 0"),
    ],
)
def test_what_it_cannot_do(tmp_path, shapes, monkeypatch, capsys, more, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs/x").mkdir(parents=True)
    with pytest.raises(SystemExit):
        configuration(shapes, more)
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_results_of_other_settings_are_not_mixed(tmp_path, shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_settings(configuration(shapes))
    check_settings(configuration(shapes, "--seeds 5 --quantizers ema --num_workers 2"))
    with pytest.raises(UserError, match="--train_steps 7 contradicts logs/compared.*--train_steps 1000"):
        check_settings(configuration(shapes, "--train_steps 7"))
    with pytest.raises(UserError, match="--random_crop 0.5 contradicts logs/compared.*no --random_crop"):
        check_settings(configuration(shapes, "--random_crop 0.5"))


def test_a_killed_comparison_continues(tmp_path, shapes, monkeypatch, capsys):
    """Killed with SIGKILL in its first training, with the script that it called; finished work is done once."""
    flags = vqgan_flags(shapes, "compared", "--quantizers nearest --seeds 1 --train_steps 60 --prior_steps 2")
    flags += words("--preset demo --codebook_init uniform")
    logs = tmp_path / "logs/compared"
    process = start(SCRIPT, flags, tmp_path)
    deadline = time.monotonic() + 200
    while not list(logs.glob("nearest_0/vqgan/saved_models/manifest_*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(json.loads((logs / "nearest_0/vqgan/.lock").read_text())["pid"], signal.SIGKILL)
    process.kill()
    process.wait()
    text = run(SCRIPT, flags, tmp_path)
    assert "resumed logs/compared/nearest_0/vqgan after step" in text
    assert "[1/1] nearest, seed 0: prior" in text
    table = json.loads((logs / "table.json").read_text())
    assert [(c["quantizer"], c["seed"]) for c in table["cells"]] == [("nearest", 0)]
    for row in table["cells"]:
        assert 1 <= row["perplexity"] <= row["codes_used"] <= 16 and 0 < row["l1"] < 1
        assert row["bits_per_picture"] == pytest.approx(16 * row["bits_per_code"])
    with Image.open(logs / "images/distortion_and_bits.png") as picture:
        assert picture.size[0] > 400
    (line,) = (logs / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["table"] == table["table"]
    monkeypatch.chdir(tmp_path)
    compare_quantizers.main(experiment(compare_quantizers, flags))
    again = capsys.readouterr().out
    assert "[1/1]" not in again and "recommended" in again
    assert json.loads((logs / "table.json").read_text()) == table
