"""Killed runs resume as if nothing had happened, bit for bit (CPU)."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from scripts import run, sampler_flags, start, train_stage_1, vqgan_flags

from models.quantizers import QUANTIZERS
from utils.core.checkpoint import Checkpoints
from utils.core.files import load_tensors

EVENTS = (
    "--steps_per_log 3 --steps_per_checkpoint 4 --steps_per_eval 5 --steps_per_save_output 6 --ema "
    "--steps_per_update_ema 2 --horizontal_flip"
)
STAGE_1 = f"{EVENTS} --train_steps 40 --disc_start_step 6 --diff_aug"
STAGE_2 = f"{EVENTS} --train_steps 60 --resid_pdrop 0.1"


def assert_same_values(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_values(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_values(x, y)
    else:
        assert a == b


def assert_same_weights(one, other, step):
    """Weights, averages and optimisers of two runs are identical."""
    names = sorted(p.name for p in (one / "saved_models").glob(f"*_{step}.th"))
    assert len(names) >= 3
    assert names == sorted(p.name for p in (other / "saved_models").glob(f"*_{step}.th"))
    for name in names:
        assert_same_values(load_tensors(one / "saved_models" / name), load_tensors(other / "saved_models" / name))


def assert_same_runs(one, other, step):
    """Weights, averages, optimisers, meters, curves, bars and pictures of two runs are identical."""
    assert_same_weights(one, other, step)
    assert_same_values(
        load_tensors(one / "saved_stats" / f"stats_{step}"), load_tensors(other / "saved_stats" / f"stats_{step}")
    )
    for name in ("stats.jsonl", "bars.json"):
        assert (one / name).exists() == (other / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (other / name).read_bytes()
    pictures = sorted(p.name for p in (one / "images").iterdir())
    assert pictures == sorted(p.name for p in (other / "images").iterdir())
    for name in pictures:
        assert (one / "images" / name).read_bytes() == (other / "images" / name).read_bytes()


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_run_whose_output_is_closed_stops_with_a_checkpoint(tmp_path, shapes, both):
    """`train_vqgan.py ... | head -1`"""
    flags = vqgan_flags(shapes, "run", "--train_steps 100000 --steps_per_checkpoint 0 --steps_per_save_output 0")
    words = [sys.executable, str(ROOT / "train_vqgan.py"), *flags]
    errors = subprocess.STDOUT if both else subprocess.PIPE
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, text=True)
    process.stdout.readline()
    process.stdout.close()
    said = "" if both else process.stderr.read()
    assert process.wait(timeout=120) == 128 + 13
    store = Checkpoints(tmp_path / "logs/run")
    (step,) = store.steps()
    assert 1 <= step < 100000
    if not both:
        (line,) = said.splitlines()
        assert line.startswith(f"stopped by closed output (no program reads stdout any more) after step {step};")
        assert "--log_dir run --resume" in line
    assert "stopped by closed output" in (tmp_path / "logs/run/log.txt").read_text()


def wait_for_step(folder, step, process):
    """Wait until stats.jsonl has a line of this step or later."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        path = folder / "stats.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not come so far")


def kill_and_resume(script, flags_of, cwd, kill_after, last):
    """One run undisturbed, one killed with SIGKILL after each step of kill_after and resumed."""
    run(script, flags_of("whole"), cwd)
    for after in kill_after:
        process = start(script, [*flags_of("killed"), "--resume"], cwd)
        wait_for_step(cwd / "logs" / "killed", after, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    text = run(script, [*flags_of("killed"), "--resume"], cwd)
    assert "resumed" in text
    assert_same_runs(cwd / "logs" / "whole", cwd / "logs" / "killed", last)


def test_killed_vqgan_run_equals_the_uninterrupted(tmp_path, shapes):
    kill_and_resume("train_vqgan.py", lambda name: vqgan_flags(shapes, name, STAGE_1), tmp_path, (6, 15), 40)


def test_killed_sampler_run_equals_the_uninterrupted(tmp_path, shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "ae", "--train_steps 3")
    kill_and_resume(
        "train_sampler.py", lambda name: sampler_flags(shapes, name, "ae", 3, STAGE_2), tmp_path, (9, 21), 60
    )


OF_THE_DISCRIMINATOR = "--disc_start_step 1 --disc_warmup_steps 1 --disc_ramp_steps 3 --lecam_weight 0.5"


@pytest.mark.parametrize(
    "more", [*(f"--quantizer {name}" for name in QUANTIZERS), OF_THE_DISCRIMINATOR, "--random_crop 0.3"]
)
def test_every_kind_of_stage_1_resumes(tmp_path, shapes, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    flags = f"{more} --train_steps 6 --steps_per_checkpoint 3 --steps_per_log 2 --steps_per_eval 4"
    train_stage_1(shapes, "whole", flags)
    shutil.copytree("logs/whole", "logs/stopped")
    Path("logs/stopped/saved_models/manifest_6.json").unlink()
    capsys.readouterr()
    train_stage_1(shapes, "stopped", f"{flags} --resume")
    assert "resumed logs/stopped after step 3" in capsys.readouterr().out
    assert_same_runs(Path("logs/whole"), Path("logs/stopped"), 6)


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, shapes, number, code):
    flags = vqgan_flags(shapes, "run", "--steps_per_log 1 --steps_per_checkpoint 0 --train_steps 100000")
    process = start("train_vqgan.py", flags, tmp_path)
    wait_for_step(tmp_path / "logs" / "run", 3, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    manifests = list((tmp_path / "logs" / "run" / "saved_models").glob("manifest_*.json"))
    assert len(manifests) == 1
    step = json.loads(manifests[0].read_text())["step"]
    lines = (tmp_path / "logs" / "run" / "stats.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step
    # A checkpoint in the middle of a log interval resumes exactly, too.
    text = run("train_vqgan.py", [*flags, "--resume", "--train_steps", str(step + 2)], tmp_path)
    assert f"after step {step}" in text


def test_a_damaged_checkpoint_is_named_and_the_one_before_resumed(tmp_path, shapes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--train_steps 8 --steps_per_checkpoint 4 --steps_per_log 2"
    train_stage_1(shapes, "whole", flags)
    train_stage_1(shapes, "damaged", flags)
    path = Path("logs/damaged/saved_models/vqgan_8.th")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    capsys.readouterr()
    train_stage_1(shapes, "damaged", flags + " --resume --no_horizontal_flip")
    assert "vqgan_8.th" in capsys.readouterr().out
    for name in ("vqgan", "ae_optim"):
        assert_same_values(
            load_tensors(f"logs/whole/saved_models/{name}_8.th"), load_tensors(f"logs/damaged/saved_models/{name}_8.th")
        )
    assert Path("logs/whole/stats.jsonl").read_bytes() == Path("logs/damaged/stats.jsonl").read_bytes()


def test_a_run_killed_in_its_first_checkpoint_starts_afresh(tmp_path, shapes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "whole", "--train_steps 4 --steps_per_log 1")
    train_stage_1(shapes, "killed", "--train_steps 4 --steps_per_log 1")
    Path("logs/killed/saved_models/manifest_4.json").unlink()  # this and what follows are written last
    config = json.loads(Path("logs/killed/config.json").read_text())
    assert config.pop("checkpoint") == 4
    Path("logs/killed/config.json").write_text(json.dumps(config))
    train_stage_1(shapes, "killed", "--train_steps 4 --steps_per_log 1 --resume")
    assert "starting afresh" in capsys.readouterr().out
    for name in ("vqgan", "ae_optim"):
        assert_same_values(
            load_tensors(f"logs/whole/saved_models/{name}_4.th"), load_tensors(f"logs/killed/saved_models/{name}_4.th")
        )
    assert Path("logs/whole/stats.jsonl").read_bytes() == Path("logs/killed/stats.jsonl").read_bytes()
