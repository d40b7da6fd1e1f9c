"""One process at a time writes a run's folder."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from ranks import torchrun
from scripts import prior_flags, run, sampler_flags, start, train_stage_1, vqgan_flags
from test_resume import wait_for_step
from test_torchrun import finish, pid_of_rank

from utils.core import lock
from utils.core.errors import UserError
from utils.core.lock import FolderLock

LONG = "--train_steps 100000 --steps_per_log 1 --steps_per_checkpoint 2"


def outputs(cwd):
    return [p.read_text() for p in sorted(Path(cwd).glob("out_*.txt"), key=lambda p: int(p.stem[4:]))]


def children_of(pid):
    """The numbers of the processes that any of a process's threads has started."""
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]


def end(process):
    process.kill()
    process.wait()


def test_the_lock_is_a_file_of_the_folder(tmp_path):
    (tmp_path / "elsewhere").write_text("what is there")
    for kind, make in (("symbolic link", lambda path: path.symlink_to(tmp_path / "elsewhere")), ("pipe", os.mkfifo)):
        make(tmp_path / ".lock")
        with pytest.raises(UserError, match=f".lock is a {kind}.*: remove it"):
            FolderLock(tmp_path, pytest.fail)
        (tmp_path / ".lock").unlink()
    assert (tmp_path / "elsewhere").read_text() == "what is there"


@pytest.mark.parametrize("pairs", [5, pytest.param(45, marks=pytest.mark.slow)])
def test_of_two_simultaneous_starts_one_trains(tmp_path, shapes, pairs):
    for i in range(pairs):
        cwd = tmp_path / str(i)
        cwd.mkdir()
        flags = vqgan_flags(shapes, "run", "--train_steps 6 --steps_per_log 1 --steps_per_checkpoint 2")
        both = [start("train_vqgan.py", [*flags, "--seed", seed], cwd) for seed in ("1", "2")]
        codes = [process.wait(timeout=120) for process in both]
        assert sorted(codes) == [0, 1], outputs(cwd)
        (line,) = [t for t, code in zip(outputs(cwd), codes, strict=True) if code]
        # Either they met, or the second came when the first had finished.
        assert "is in use by" in line or "already holds checkpoints" in line
        winner = codes.index(0) + 1
        assert json.loads((cwd / "logs/run/config.json").read_text())["hparams"]["seed"] == winner
        rows = [json.loads(row)["step"] for row in (cwd / "logs/run/stats.jsonl").read_text().splitlines()]
        assert rows == [1, 2, 3, 4, 5, 6]


def test_a_live_run_is_left_alone(tmp_path, shapes, trained):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    run_1 = start("train_vqgan.py", vqgan_flags(shapes, "run", LONG), tmp_path)
    try:
        wait_for_step(tmp_path / "logs/run", 3, run_1)
        owner = f"process {run_1.pid} on "
        for script, flags in [
            ("train_vqgan.py", vqgan_flags(shapes, "run", "--resume --train_steps 1")),
            ("train_vqgan.py", vqgan_flags(shapes, "run", "--train_steps 1")),
            ("train_sampler.py", sampler_flags(shapes, "run", "ae", 4, "--train_steps 1")),
        ]:
            text = run(script, flags, tmp_path, code=1)
            assert "error: logs/run is in use by " + owner in text
        text = run("experiments/get_samples.py", prior_flags(shapes, "run", "--n_sheets 1"), tmp_path, code=2)
        assert "logs/run holds a training run" in text
        at = len((tmp_path / "logs/run/stats.jsonl").read_text().splitlines())
        wait_for_step(tmp_path / "logs/run", at + 3, run_1)
    finally:
        end(run_1)


def test_a_killed_run_releases_its_folder_at_once(tmp_path, shapes):
    """Its workers can live longer, blocked in a read: they do not hold the lock."""
    flags = vqgan_flags(shapes, "run", LONG)
    flags[flags.index("--num_workers") + 1] = "2"
    process = start("train_vqgan.py", flags, tmp_path)
    wait_for_step(tmp_path / "logs/run", 3, process)
    workers = children_of(process.pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # as one that waits for a disk
    end(process)
    assert len(workers) >= 2 and all(Path(f"/proc/{worker}").exists() for worker in workers)
    assert "resumed logs/run after step" in run("train_vqgan.py", [*flags, "--resume", "--train_steps", "3"], tmp_path)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def test_a_restart_in_the_same_job_waits_for_the_last_start(tmp_path, monkeypatch):
    first = FolderLock(tmp_path, print)
    pid = os.fork()
    if pid == 0:  # with what was inherited closed, the child alone cannot keep the lock
        time.sleep(30)
        os._exit(0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(lock, "WAIT_AFTER_RESTART", 0.5)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .* since 20"):
        FolderLock(tmp_path, print)
    first.release()
    FolderLock(tmp_path, print).release()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_torchrun_restarts_rank_0(tmp_path, shapes):
    events = "--train_steps 30 --steps_per_log 3 --steps_per_checkpoint 4 --resume"
    train = vqgan_flags(shapes, "killed", events)
    job = torchrun(2, "train_vqgan.py", train, tmp_path, "--max_restarts", 1)
    wait_for_step(tmp_path / "logs/killed", 9, job)
    os.kill(pid_of_rank(job, 0), signal.SIGKILL)
    assert "resumed logs/killed after step" in finish(job, tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def no_locks(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    said = []
    first = FolderLock(tmp_path, said.append)
    (warning,) = said
    note = tmp_path / ".in_use"
    assert str(note) in warning and json.loads(note.read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}.*remove {note}"):
        FolderLock(tmp_path, said.append)
    first.release()
    assert not note.exists()
    FolderLock(tmp_path, said.append).release()


def test_a_run_gives_its_folder_back_when_it_ends(tmp_path, shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "run", "--train_steps 2")
    with pytest.raises(UserError, match="already holds checkpoints"):
        train_stage_1(shapes, "run", "--train_steps 2")
    train_stage_1(shapes, "run", "--train_steps 3 --resume")
