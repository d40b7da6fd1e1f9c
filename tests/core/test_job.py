"""Which folder holds logs/, the caches and datasets.yaml."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from scripts import run, sampler_flags, vqgan_flags

from utils.core.files import read_json

SHOW = "from utils.core import job; print(job.ROOT, job.LOGS, job.in_root('data/x'), job.describe_root(), sep='\\n')"


def found(cwd, named=None):
    """[root, logs/, data/x of datasets.yaml, the line that names it] in this current folder."""
    env = {name: value for name, value in os.environ.items() if name != "UNLEASHING_ROOT"}
    env |= dict(PYTHONPATH=str(ROOT), **({"UNLEASHING_ROOT": str(named)} if named else {}))
    return subprocess.check_output([sys.executable, "-c", SHOW], cwd=cwd, env=env, text=True).splitlines()


HERE = [".", "logs", "data/x", "None"]


def test_the_current_folder_is_the_root_if_it_has_logs_or_data_sets(tmp_path):
    assert found(ROOT) == HERE
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "logs").mkdir()
    (tmp_path / "b" / "datasets.yaml").write_text("")
    assert found(tmp_path / "a") == found(tmp_path / "b") == HERE


def test_elsewhere_it_is_the_repository(tmp_path):
    reason = "the current folder has no logs/ and no datasets.yaml"
    line = f"logs/, caches and datasets.yaml are those of {ROOT}: {reason}"
    assert found(tmp_path) == [f"{ROOT}", f"{ROOT}/logs", f"{ROOT}/data/x", line]
    assert found(ROOT / "experiments")[0] == f"{ROOT}"
    below = ROOT.name
    assert found(ROOT.parent)[:3] == [below, f"{below}/logs", f"{below}/data/x"], "as seen from here"


def test_the_environment_names_another_root(tmp_path):
    (tmp_path / "here" / "logs").mkdir(parents=True)
    for named, root in ((tmp_path / "runs", f"{tmp_path}/runs"), (tmp_path / "here" / "x", "x")):
        assert found(tmp_path / "here", named)[:2] == [root, f"{root}/logs"]
    assert found(tmp_path / "here", tmp_path / "runs")[3].endswith("/runs: UNLEASHING_ROOT names it")
    for named in (".", tmp_path / "here"):
        assert found(tmp_path / "here", named) == HERE


@pytest.fixture
def elsewhere(shapes, tmp_path, monkeypatch):
    """root/ with datasets.yaml, work/ with photos/, and the folders that a user works in; work/ is the current one."""
    for name in ("root", "work", "third"):
        (tmp_path / name).mkdir()
    (tmp_path / "root" / "datasets.yaml").write_text("mine: {paths: own}")
    for name in ("root/own", "work/photos"):
        (tmp_path / name).symlink_to(shapes)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("UNLEASHING_ROOT", "../root")
    return tmp_path


def test_a_run_is_the_same_from_every_folder(elsewhere):
    text = run("train_vqgan.py", vqgan_flags("photos", "ae", "--train_steps 2 --steps_per_eval 2"), ".")
    first, second = text.splitlines()[:2]
    root = elsewhere / "root"
    assert first == "note: logs/, caches and datasets.yaml are those of ../root: UNLEASHING_ROOT names it"
    assert "40 images of 'custom' (38 train, 2 validate)" in second
    assert sorted(p.name for p in elsewhere.glob("work/*")) == ["out_0.txt", "photos"]
    assert read_json(root / "logs/ae/config.json")["hparams"]["custom_dataset_path"] == f"{elsewhere}/work/photos"
    following = [line.split()[2:] for line in text.splitlines() if line.startswith("  ") and "train_sampler" in line]
    text = run("train_sampler.py", [*following[0], "--dry_run"], elsewhere / "third")
    assert "Traceback" not in text
    os.rename(elsewhere / "work" / "photos", elsewhere / "moved")
    text = run("train_vqgan.py", vqgan_flags("../moved", "ae", "--train_steps 3 --resume"), elsewhere / "third")
    assert "resumed ../root/logs/ae after step 2" in text and "warning" not in text


def test_caches_do_not_depend_on_the_current_folder(elsewhere, monkeypatch):
    def mine(flags):
        place = flags.index("--custom_dataset_path")
        flags[place : place + 2] = []
        flags[flags.index("custom")] = "mine"
        return flags

    root = elsewhere / "root"
    run("train_vqgan.py", mine(vqgan_flags("x", "ae", "--train_steps 1")), ".")
    run("train_sampler.py", mine(sampler_flags("x", "a", "ae", 1, "--train_steps 1")), ".")
    (codes,) = (root / "latents").iterdir()
    monkeypatch.setenv("UNLEASHING_ROOT", "")
    text = run("train_sampler.py", mine(sampler_flags("x", "b", "ae", 1, "--train_steps 1")), root)
    assert "note" not in text and f"read from latents/{codes.name}" in text
    assert list((root / "latents").iterdir()) == [codes]


def test_a_root_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEASHING_ROOT", "nowhere")
    text = run("train_vqgan.py", vqgan_flags("x", "ae"), tmp_path, code=2)
    assert "UNLEASHING_ROOT names nowhere, which is not a folder" in text and len(text.splitlines()) == 1
