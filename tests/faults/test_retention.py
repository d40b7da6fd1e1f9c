"""--keep_checkpoints: what is removed, when, and what never is."""

import os

import pytest
import torch

from faults.forks import forked
from faults.stages import STAGES
from utils.core.checkpoint import Checkpoints
from utils.core.files import read_json, write_json

STATE = dict(w=torch.arange(10.0))
STEPS = [10, 20, 30, 40, 50]


@pytest.fixture
def store(tmp_path):
    """Five checkpoints of a run, and weights that another program put there."""
    store = Checkpoints(tmp_path / "logs" / "run")
    for step in STEPS:
        store.save(step, dict(vqgan=STATE, ae_optim=STATE), dict(count=step), {})
    (store.models / "vqgan_5.th").write_bytes(b"published")
    (store.models / "notes_10.txt").write_bytes(b"about step 10")
    return Checkpoints(store.folder)  # a later process, which knows nothing of what the first one wrote


def files_of(store, step):
    return sorted(p.name for p in store.folder.rglob("*") if p.stem.endswith(f"_{step}") and p.suffix != ".txt")


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("keep", "kept"), [(1, 2), (2, 2), (3, 3), (9, 5)])
def test_the_newest_are_kept_and_never_fewer_than_two(store, keep, kept):
    store.prune(keep)
    assert store.steps() == STEPS[-kept:]
    for step in STEPS:
        assert len(files_of(store, step)) == (4 if step in STEPS[-kept:] else 0)
    assert (store.models / "vqgan_5.th").read_bytes() == b"published" and (store.models / "notes_10.txt").exists()
    assert not list(store.folder.rglob(".*"))


@pytest.mark.parametrize("file", ["vqgan_50.th", "ae_optim_50.th", "manifest_50.json", "../saved_stats/stats_50"])
def test_a_damaged_one_does_not_count(store, file):
    flip_last_byte(store.models / file)
    store.prune(2)
    assert store.steps() == [30, 40, 50]
    assert store.newest_good(print)[0] == 40


def test_what_a_damaged_manifest_named_is_left(store):
    store.manifest_path(10).write_text("{")
    store.prune(2)
    assert store.steps() == [10, 40, 50] and len(files_of(store, 10)) == 4 and not files_of(store, 20)


def test_a_removal_that_was_interrupted_is_finished_later(store):
    os.replace(store.manifest_path(20), store.models / ".unfinished_20.json")  # it goes first
    assert store.steps() == [10, 30, 40, 50]
    store.path("vqgan", 20).unlink()
    store.save(60, dict(vqgan=STATE), {}, {})
    assert not files_of(store, 20) and len(files_of(store, 10)) == 4


def test_no_manifest_leads_out_of_its_step(store, tmp_path):
    """Neither one that was made up, nor a note of what was being written."""
    (tmp_path / "precious").touch()
    names = ["../../precious", str(tmp_path / "precious"), "saved_models/vqgan_5.th", "saved_models/vqgan_50.th"]
    manifest = {k: v for k, v in read_json(store.manifest_path(10)).items() if k != "digest"}
    manifest["files"].update({name: dict(bytes=0, sha256="") for name in names})
    write_json(store.manifest_path(10), manifest)
    write_json(store.models / ".unfinished_7.json", dict(files=names))
    for number, content in enumerate((b"", b"[]", b'{"files": 3}', b'{"files": [[]]}')):
        (store.models / f".unfinished_{70 + number}.json").write_bytes(content)
    store.prune(2)
    assert store.steps() == [10, 40, 50]  # 10 is damaged now: nothing that it names is removed
    assert (tmp_path / "precious").exists() and (store.models / "vqgan_5.th").exists()
    assert store.verify(50) and not list(store.folder.rglob(".*"))


def test_a_checkpoint_that_was_begun_is_swept_but_not_one_that_was_there(store):
    for step in (50, 60):
        store.path("vqgan", step).write_bytes(b"half")
        names = [f"saved_models/vqgan_{step}.th"]
        write_json(store.models / f".unfinished_{step}.json", dict(files=names))
    store.sweep()
    assert not store.path("vqgan", 60).exists()
    assert store.path("vqgan", 50).exists() and store.newest_good(print)[0] == 40


@pytest.mark.parametrize(("keep", "steps"), [("0", [2, 4, 6, 7]), ("1", [6, 7]), ("3", [4, 6, 7])])
def test_a_run_keeps_what_it_is_told_to(place, keep, steps):
    outcome = forked(STAGES["sampler"]("--train_steps", "7", "--keep_checkpoints", keep), place)
    assert outcome.code == 0, outcome.text
    assert Checkpoints(place / "logs" / "run").steps() == steps
