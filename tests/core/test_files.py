"""Files are complete or absent, and no file that is read can run code or end in a traceback."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scripts import experiment, prior_flags, train_stage_2

from experiments import get_samples
from utils.core.checkpoint import Checkpoints, load_into
from utils.core.errors import DamagedFile, UserError
from utils.core.files import (
    Lines,
    atomic_write,
    hash_json,
    hash_tensors,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
)
from utils.display.images import save_png

VALUE = dict(w=torch.arange(6.0).view(2, 3), ids=torch.arange(5, dtype=torch.int16), n=[1, 2.5, "x", None], s=True)


def same(a, b):
    """Whether two dicts hold the same tensors and the same other values."""

    def parts(value):
        tensors = {k: v for k, v in value.items() if torch.is_tensor(v)}
        return hash_tensors(tensors), {k: v for k, v in value.items() if k not in tensors}

    return parts(a) == parts(b)


class RunsCode:
    """Unpickled by a trusting reader, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def mutations(content, count, seed=0):
    """`count` damaged versions of some bytes: cut, flipped, overwritten, moved, with a piece put in."""
    rng = random.Random(seed)
    for number in range(count):
        damaged = bytearray(content)
        i = rng.randrange(len(content))
        if number % 4 == 0:
            del damaged[i:]
        elif number % 4 == 1:
            damaged[i] ^= 1 << rng.randrange(8)
        elif number % 4 == 2:
            damaged[i : i + 16] = rng.randbytes(rng.randrange(32))
        else:
            j = rng.randrange(len(content))
            damaged[i : i + 16] = damaged[j : j + 16]
        if damaged != content:
            yield bytes(damaged)


# ---------------------------------------------------------------------- writing


class FailsWhileWritten:
    def __reduce__(self):
        raise ValueError("cannot be saved")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_leaves_all_or_nothing(tmp_path, error):
    path = tmp_path / "folder" / "x.bin"
    with atomic_write(path) as f:
        f.write(b"old")
    with pytest.raises(error), atomic_write(path) as f:
        f.write(b"new" * 100_000)
        assert path.read_bytes() == b"old"
        raise error
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["x.bin"]
    with atomic_write(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["x.bin"]


def test_an_object_that_raises_while_it_is_saved(tmp_path):
    path = tmp_path / "x.th"
    save_tensors(path, VALUE)
    with pytest.raises(ValueError, match="cannot be saved"):
        save_tensors(path, dict(VALUE, bad=FailsWhileWritten()))
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", dict(bad=object()))
    assert os.listdir(tmp_path) == ["x.th"] and same(load_tensors(path), VALUE)


def test_files_get_the_permissions_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to(path.parent / "precious"), "a symbolic link to .*precious, not a regular file"),
        (lambda path: path.symlink_to("missing"), "a symbolic link to missing"),
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "a pipe"),
    ],
    ids=["link", "dangling", "folder", "pipe"],
)
def test_only_a_regular_file_is_appended_to(tmp_path, monkeypatch, make, said):
    (tmp_path / "precious").write_bytes(b"no newline at the end")
    path = tmp_path / "stats.jsonl"
    make(path)
    with pytest.raises(UserError, match=f"{said}.*: remove it, or put a regular file in its place"):
        Lines(path, keep=0)
    monkeypatch.setattr("utils.core.files.check_appendable", lambda path: None)
    with pytest.raises(OSError):  # it appeared after the check
        Lines(path, keep=0)
    assert (tmp_path / "precious").read_bytes() == b"no newline at the end" and not (tmp_path / "missing").exists()


@pytest.mark.parametrize("name", ["log.txt", "stats.jsonl", "speed.jsonl", "metrics.jsonl"])
def test_a_run_appends_to_no_file_outside_of_its_folder(trained, tmp_path, monkeypatch, shapes, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "logs", "logs")
    Path("precious").write_bytes(b"no newline at the end")
    folder = Path("logs", "samples" if name == "metrics.jsonl" else "prior")
    folder.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        if name == "metrics.jsonl":
            get_samples.main(experiment(get_samples, prior_flags(shapes, "samples", "--n_sheets 1")))
        else:
            train_stage_2(shapes, "prior", "ae", 4, "--resume --train_steps 4")
    assert Path("precious").read_bytes() == b"no newline at the end"


def test_full_disk(tmp_path):
    """A disk that takes no more: the disk's own error, with its number, and nothing left behind."""
    program = textwrap.dedent("""
        import os, resource, signal, sys
        import torch
        from utils.core.files import save_tensors

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        path = os.path.join(sys.argv[1], "x.th")
        for n in (60_000, 3_000_000):
            try:
                save_tensors(path, dict(a=torch.zeros(n)))
            except OSError as error:
                print(error.errno, error.filename == path, os.listdir(sys.argv[1]))
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.EFBIG} True []\n" * 2, done.stderr


@pytest.mark.parametrize(
    ("tail", "kept"), [(b'{"a": 3}', b'{"a": 3}\n'), (b'{"a": ', b""), (b"3", b""), (b"text \xff", b""), (b"", b"")]
)
def test_a_last_row_without_its_end_is_kept_if_it_is_complete(tmp_path, tail, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n' + tail)
    for number in (4, 5):
        lines = Lines(path)
        lines.append(f'{{"a": {number}}}')
        lines.close()
        assert (lines.size, lines.sha256) == (path.stat().st_size, sha256_file(path))
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n' + kept + b'{"a": 4}\n{"a": 5}\n'


def test_png_files_are_what_they_show(tmp_path):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8))
    save_png(tmp_path / "a.png", x)
    save_png(tmp_path / "b.png", x[:1], min_side=16)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == x.permute(1, 2, 0).numpy()).all()
    enlarged = np.asarray(Image.open(tmp_path / "b.png"))
    assert enlarged.shape == (20, 28) and (enlarged[::4, ::4] == x[0].numpy()).all()
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


# ---------------------------------------------------------------------- reading


def test_tensors_come_back_as_they_were(tmp_path):
    facts = save_tensors(tmp_path / "x.th", VALUE)
    assert same(load_tensors(tmp_path / "x.th"), VALUE)
    assert facts == dict(bytes=(tmp_path / "x.th").stat().st_size, sha256=sha256_file(tmp_path / "x.th"))
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    save_tensors(tmp_path / "o.th", optimiser.state_dict())
    assert load_tensors(tmp_path / "o.th") == optimiser.state_dict()


def test_missing_file(tmp_path):
    for path, said in ((tmp_path / "no.th", "does not exist"), (tmp_path, "is a folder, not a file")):
        with pytest.raises(UserError, match=said):
            load_tensors(path)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_file_cannot_run_code(tmp_path, writer):
    store = Checkpoints(tmp_path)
    store.models.mkdir()
    for path, read in (
        (tmp_path / "x.th", lambda: load_tensors(tmp_path / "x.th")),
        (store.path("vqgan", 1), lambda: store.load("vqgan", 1)),
    ):
        writer(dict(w=torch.zeros(2), bad=RunsCode(tmp_path / "executed")), path)
        with pytest.raises(DamagedFile, match="refused|damaged"):
            read()
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "x.th", weights_only=False) if writer is torch.save else None
    assert (tmp_path / "executed").exists() == (writer is torch.save), "the trap works"


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_tensors_are_told(tmp_path, zipped):
    """Any damage: DamagedFile, or, where it hit nothing that is checked, a value; never another exception."""
    path = tmp_path / "x.th"
    torch.save(VALUE, path, _use_new_zipfile_serialization=zipped)
    told = 0
    for content in mutations(path.read_bytes(), 100):
        path.write_bytes(content)
        try:
            load_tensors(path)
        except DamagedFile as error:
            told += str(path) in str(error) and "\n" not in str(error)
    assert told > 50


def foreign_files(folder):
    Image.new("RGB", (4, 4)).save(folder / "picture.th", "PNG")
    np.savez(folder / "arrays.npz", a=np.zeros(3))
    (folder / "arrays.npz").rename(folder / "arrays.th")
    with zipfile.ZipFile(folder / "archive.th", "w") as f:
        f.writestr("a.txt", "text")
    (folder / "empty.th").touch()
    (folder / "text.th").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "zeros.th").write_bytes(bytes(5000))
    (folder / "numbers.th").write_bytes(pickle.dumps([1, 2, 3]))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.th")
    return sorted(folder.glob("*.th"))


@pytest.mark.filterwarnings("ignore")
def test_foreign_files_are_told(tmp_path):
    paths = foreign_files(tmp_path)
    assert len(paths) == 8
    for path in paths:
        with pytest.raises(DamagedFile, match=path.name):
            load_tensors(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    save_tensors(tmp_path / "x.th", VALUE)
    os.chmod(tmp_path / "x.th", 0)
    with pytest.raises(PermissionError):
        load_tensors(tmp_path / "x.th")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"nothing", b"[" * 22 + b"]" * 22])
def test_damaged_json_is_told(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedFile, match="x.json"):
        read_json(tmp_path / "x.json")


def test_json_is_read_from_regular_files_of_bounded_size(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[" * 21 + b"]" * 21)
    assert read_json(tmp_path / "x.json")
    os.mkfifo(tmp_path / "pipe.json")  # opening it would block
    with open(tmp_path / "large.json", "wb") as f:
        f.truncate(1 << 40)
    for name in ("pipe.json", "large.json"):
        with pytest.raises(DamagedFile, match=f"{name} is damaged: .*not a regular file of at most 64 MiB"):
            read_json(tmp_path / name)


def test_hashes_tell_values_names_shapes_and_types_apart():
    a = torch.arange(6.0)
    states = [dict(a=a), dict(b=a), dict(a=a.view(2, 3)), dict(a=a.int()), dict(a=a + 1e-6)]
    states += [dict(a=a, b=torch.zeros(0)), dict(a=a.bfloat16()), dict(a=a[0]), {}]
    assert len({hash_tensors(s) for s in states}) == len(states)
    assert hash_tensors(dict(a=a, b=a + 1)) == hash_tensors(dict(b=a + 1, a=torch.stack((a, a), 1)[:, 0]))
    assert hash_json(dict(a=1, b=2)) == hash_json(dict(b=2, a=1)) != hash_json(dict(a=2, b=1))


# ---------------------------------------------------------------------- checkpoints


STATE = dict(w=torch.arange(40.0))


@pytest.fixture
def store(tmp_path):
    """Checkpoints 10, 20, 30 of a run."""
    store = Checkpoints(tmp_path / "logs" / "run")
    for step in (10, 20, 30):
        store.save(step, dict(vqgan=dict(w=STATE["w"] + step), ae_optim=STATE), dict(count=step), dict(run="vqgan"))
    return store


def newest(store):
    """(step, warnings) of the newest good checkpoint."""
    said = []
    step, manifest = store.newest_good(said.append)
    assert manifest is None if step is None else manifest["step"] == step
    return step, said


def flip_byte(path, at=-100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_checkpoint_layout(store):
    assert store.steps() == store.steps_with("vqgan") == [10, 20, 30] and store.steps_with("vqgan_ema") == []
    assert sorted(os.listdir(store.models)) == sorted(
        f"{name}_{s}.{end}"
        for s in (10, 20, 30)
        for name, end in (("vqgan", "th"), ("ae_optim", "th"), ("manifest", "json"))
    )
    assert sorted(os.listdir(store.stats)) == ["stats_10", "stats_20", "stats_30"]
    assert newest(store) == (30, [])
    assert torch.equal(store.load("vqgan", 20)["w"], STATE["w"] + 20) and store.load_stats(20) == dict(count=20)
    assert torch.equal(torch.load(store.path("vqgan", 20))["w"], STATE["w"] + 20), "a plain state dict"
    assert store.verify(30)["run"] == "vqgan"


def test_no_checkpoints(tmp_path):
    store = Checkpoints(tmp_path / "nothing")
    assert store.steps() == [] and newest(store) == (None, [])
    with pytest.raises(UserError, match="steps of 'vqgan' in .*: none"):
        store.load("vqgan", 1)


def test_a_checkpoint_without_manifest_does_not_count(store):
    store.manifest_path(30).unlink()
    assert newest(store) == (20, [])
    assert torch.equal(store.load("vqgan", 30)["w"], STATE["w"] + 30), "by name it is read, as a published one is"


@pytest.mark.parametrize("victim", ["vqgan_30.th", "ae_optim_30.th", "manifest_30.json", "../saved_stats/stats_30"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_the_newest_whole_checkpoint_is_taken(store, victim, damage):
    path = store.models / victim
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        flip_byte(path, 60)
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size // 2)
    step, said = newest(store)
    assert step == 20
    if (victim, damage) != ("manifest_30.json", "missing"):
        assert len(said) == 1 and "checkpoint 30 is skipped" in said[0] and path.name in said[0]
        with pytest.raises(DamagedFile):
            store.verify(30)


def test_none_is_whole(store):
    for step in (10, 20, 30):
        flip_byte(store.path("vqgan", step))
    step, said = newest(store)
    assert step is None and len(said) == 3


def test_damage_is_told_by_name_when_asked_for(store):
    flip_byte(store.path("vqgan", 20))
    with pytest.raises(DamagedFile, match="vqgan_20.th is damaged: its contents are not what was written"):
        store.load("vqgan", 20)
    assert store.load("ae_optim", 20)
    with pytest.raises(UserError, match=r"vqgan_25.th does not exist; steps of 'vqgan' in .*: 10, 20, 30"):
        store.load("vqgan", 25)
    torch.save([1, 2], store.path("vqgan", 40))
    with pytest.raises(DamagedFile, match="no state dict"):
        store.load("vqgan", 40)


def test_a_damaged_manifest_is_found_out(store):
    """Whatever byte of it changes: it says the same as before, or it is damaged."""
    path = store.manifest_path(30)
    content, written = path.read_bytes(), store.verify(30)
    for damaged in mutations(content, 200):
        path.write_bytes(damaged)
        try:
            manifest = store.verify(30)
        except DamagedFile:
            continue
        assert {k: manifest.get(k) for k in written} == written
    for foreign in ("[]", "3", "null", "{}", '{"files": 3}', '{"files": {"x": 3}, "step": 30}', '{"files": [[1]]}'):
        path.write_text(foreign)
        with pytest.raises(DamagedFile):
            store.verify(30)
        if foreign not in ("{}", '{"files": {"x": 3}, "step": 30}'):
            with pytest.raises(DamagedFile):
                store.load("vqgan", 30)


HOSTILE = {
    "step": [True, "30", 30.0, None],
    "files": [
        7,
        "x",
        [["saved_models/vqgan_30.th", 1]],
        {"saved_models/vqgan_30.th": 3},
        {"saved_models/vqgan_30.th": dict(bytes="9", sha256="x")},
        {"saved_models/vqgan_30.th": dict(bytes=9)},
    ],
    "stats_bytes": ["9", -1, True, 1.5, None, [9]],
    "stats_sha256": [9, None],
    "run": [7],
    "script": [{}],
    "hparams": [7, "x", []],
    "images": [7, "x", {}, dict(count="9", names="x"), dict(count=9)],
    "autoencoder": ["x", 7, {}, dict(hash=7, path="x"), dict(hash="x")],
}


def rewrite(path, digest=True, **values):
    """Change a manifest as an attacker would, who can compute the digest or leave it out."""
    manifest = dict(json.loads(path.read_text()), **values)
    del manifest["digest"]
    path.write_text(json.dumps(dict(manifest, digest=hash_json(manifest)) if digest else manifest))


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "no digest"])
@pytest.mark.parametrize("field", HOSTILE)
def test_a_hostile_manifest_is_damaged(store, field, digest):
    path = store.manifest_path(30)
    written = path.read_text()
    for value in HOSTILE[field]:
        path.write_text(written)
        rewrite(path, digest, **{field: value})
        for read in (store.verify, store.manifest, lambda step: store.load("vqgan", step)):
            with pytest.raises(DamagedFile, match=f"manifest_30.json is damaged: .*'{field}'"):
                read(30)
        step, said = newest(store)
        assert step == 20 and len(said) == 1


def test_a_manifest_names_no_files_of_other_folders(store, tmp_path):
    (tmp_path / "private").write_bytes(b"x")
    outside = dict(bytes=1, sha256=sha256_file(tmp_path / "private"))
    for name in (str(tmp_path / "private"), "../private", "saved_models/../../private", "saved_stats/stats_20"):
        rewrite(store.manifest_path(30), files={name: outside})
        with pytest.raises(DamagedFile, match="manifest_30.json is damaged"):
            store.verify(30)


def test_hostile_manifests_end_a_command_with_one_line(trained, tmp_path, monkeypatch, shapes, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "logs", "logs")
    manifest = Checkpoints("logs/prior").manifest_path(3)
    written = manifest.read_text()
    for field in ("images", "autoencoder", "stats_bytes", "hparams", "files"):
        for value in HOSTILE[field]:
            manifest.write_text(written)
            rewrite(manifest, **{field: value})
            with pytest.raises(UserError, match="no checkpoint in logs/prior is complete"):
                train_stage_2(shapes, "prior", "ae", 4, "--resume --train_steps 4")
            assert f"'{field}'" in capsys.readouterr().out
            with pytest.raises(DamagedFile, match=f"manifest_3.json is damaged: .*'{field}'"):
                get_samples.main(experiment(get_samples, prior_flags(shapes, "samples", "--n_sheets 1")))


def test_a_manifest_of_before_there_were_digests(store):
    manifest = json.loads(store.manifest_path(30).read_text())
    del manifest["digest"]
    store.manifest_path(30).write_text(json.dumps(manifest))
    assert newest(store) == (30, [])


def test_a_disk_that_cannot_read_a_checkpoint_back(store, monkeypatch):
    def broken_sectors(path):
        if "_30" in path.name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256_file(path)

    monkeypatch.setattr("utils.core.checkpoint.sha256_file", broken_sectors)
    step, said = newest(store)
    assert step == 20 and "Input/output error" in said[0]


def test_leftovers_of_a_killed_process_are_removed(store):
    for folder in (store.models, store.stats):
        (folder / ".vqgan_35.th.0123abcd.tmp").write_bytes(b"half a checkpoint")
    store.save(40, dict(vqgan=STATE), {}, {})
    assert not list(store.folder.glob("*/.*")) and newest(store) == (40, [])


def test_an_interrupted_checkpoint_leaves_the_older_ones(store):
    with pytest.raises(ValueError):
        store.save(40, dict(vqgan=STATE, ae_optim=dict(bad=FailsWhileWritten())), {}, {})
    assert store.steps() == [10, 20, 30] and newest(store) == (30, [])
    with pytest.raises(ValueError):  # again the same step: the old manifest must not vouch for the new file
        store.save(30, dict(vqgan=STATE, ae_optim=dict(bad=FailsWhileWritten())), {}, {})
    assert newest(store)[0] == 20


def test_a_state_that_does_not_fit_is_one_line():
    module = torch.nn.Linear(2, 3)
    for state in ({}, dict(weight=torch.zeros(3, 3), bias=torch.zeros(3)), dict(weight=1, bias="x"), {1: 2}):
        with pytest.raises(UserError, match="^x.th does not fit the configured model: [^\n]+$"):
            load_into(module, state, "x.th")
    optimiser = torch.optim.Adam(module.parameters())
    for state in ({}, dict(param_groups=[], state={}), dict(param_groups=3, state=4)):
        with pytest.raises(UserError, match="does not fit"):
            load_into(optimiser, state, "x.th")
