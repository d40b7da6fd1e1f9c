"""Jobs under PyTorch's own launcher, as a user starts them: one rank dies, errors, signals."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import ROOT
from ranks import together, torchrun
from scripts import train_stage_1, vqgan_flags
from test_resume import assert_same_runs, wait_for_step

LONG = "--steps_per_log 1 --steps_per_checkpoint 0 --train_steps 100000"


def pid_of_rank(launcher, rank):
    """The process that torchrun has started as this rank."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"rank {rank} is not there")


def finish(launcher, cwd, code=0, seconds=120):
    """Wait for it; returns all that was printed, torchrun's own report of a failure included."""
    got = launcher.wait(timeout=seconds)
    text = (Path(cwd) / "torchrun.txt").read_text()
    assert (got == 0) == (code == 0), text
    return text


def errors_in(text):
    """What our processes said went wrong."""
    return [line for line in text.splitlines() if line.startswith("error: ") or ".py: error: " in line]


def test_a_killed_rank_is_restarted_and_resumes_to_the_same(tmp_path, shapes):
    events = "--train_steps 40 --steps_per_log 3 --steps_per_checkpoint 4 --ema --steps_per_update_ema 2 --resume"
    together(2, lambda: train_stage_1(shapes, "whole", events), tmp_path)
    job = torchrun(2, "train_vqgan.py", vqgan_flags(shapes, "killed", events), tmp_path, "--max_restarts", 1)
    wait_for_step(tmp_path / "logs/killed", 9, job)
    os.kill(pid_of_rank(job, 1), signal.SIGKILL)
    text = finish(job, tmp_path)
    assert "resumed logs/killed after step" in text and text.count("resumed") == 1
    assert_same_runs(tmp_path / "logs/whole", tmp_path / "logs/killed", 40)


def test_a_rank_that_dies_ends_the_job(tmp_path, shapes):
    job = torchrun(2, "train_vqgan.py", vqgan_flags(shapes, "run", LONG), tmp_path)
    wait_for_step(tmp_path / "logs/run", 3, job)
    os.kill(pid_of_rank(job, 0), signal.SIGKILL)
    text = finish(job, tmp_path, code=1, seconds=60)
    (line,) = errors_in(text)
    assert "another process of this job has ended" in line
    assert "RuntimeError" not in text and text.count("Traceback") <= 1  # torchrun's own


@pytest.mark.parametrize("whom", [pytest.param("the launcher", marks=pytest.mark.slow), "the launcher and all ranks"])
def test_a_signal_makes_one_checkpoint(tmp_path, shapes, whom):
    job = torchrun(2, "train_vqgan.py", vqgan_flags(shapes, "run", LONG), tmp_path)
    wait_for_step(tmp_path / "logs/run", 3, job)
    ranks = [pid_of_rank(job, rank) for rank in (0, 1)] if "ranks" in whom else []
    for pid in (*ranks, job.pid):
        os.kill(pid, signal.SIGTERM)
    text = finish(job, tmp_path, code=1)
    (manifest,) = (tmp_path / "logs/run/saved_models").glob("manifest_*.json")
    step = json.loads(manifest.read_text())["step"]
    assert text.count(f"stopped by a signal after step {step}; continue with --resume") == 1
    assert not errors_in(text)


def test_mistakes_are_told_once(tmp_path, shapes):
    flags = vqgan_flags(shapes, "run", "--train_steps 2")
    for words, code, said in [
        ("--batch_size 3", 2, "--batch_size 3 (of all processes together) is not divisible by 2 processes"),
        ("--perceptual_weight 1 --perceptual_weights no.pth", 1, "no.pth does not exist"),
    ]:
        text = finish(torchrun(2, "train_vqgan.py", [*flags, *words.split()], tmp_path), tmp_path, code)
        (line,) = errors_in(text)
        assert said in line


def test_the_flags_of_scaling(tmp_path):
    from test_cli import call, refused

    code, out, _ = call("experiments/scaling.py", "--help", tmp_path)
    assert code == 0 and "--seconds" in out and "torchrun --nproc_per_node" in out
    for words, named in [("--seconds 0", "--seconds 0.0"), ("--device mps", "mps"), ("--log_dir ../x", "'../x'")]:
        assert named in refused("experiments/scaling.py", words, tmp_path)
    code, _, err = call("experiments/scaling.py", "", tmp_path)
    assert code == 1 and err.startswith("error: scaling needs several processes") and err.count("\n") == 1


@pytest.mark.slow
def test_the_benchmark_under_torchrun_is_of_scaling(tmp_path):
    shutil.copy(ROOT / "datasets.yaml", tmp_path)
    (tmp_path / "logs" / "x").mkdir(parents=True)
    flags = ["--seconds", "0.01", "--size", "small", "--log_dir", "out", "--device", "cpu"]
    text = finish(torchrun(2, "experiments/benchmark.py", flags, tmp_path), tmp_path, seconds=500)
    found = json.loads((tmp_path / "logs/out/scaling.json").read_text())
    assert found["processes"] == 2
    assert [row["job"] for row in found["jobs"]] == ["VQGAN step", "sampler step", "sampling, S = 256"]
    assert all(row["one"] > 0 and row["weak"] > 0 for row in found["jobs"])
    assert ["strong" in row for row in found["jobs"]] == [True, True, False]
    assert text.count("| VQGAN step |") == 1
