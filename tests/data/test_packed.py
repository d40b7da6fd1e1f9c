"""--cache_images: the same pixels from one file, whatever happens to that file."""

import errno
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_shapes
from ranks import together
from scripts import start, train_stage_1, vqgan_flags

from utils.core.checkpoint import checkpoints_of
from utils.core.errors import UserError
from utils.core.files import hash_tensors
from utils.data import images as images_module
from utils.data import packed
from utils.data.batches import one_pass
from utils.data.images import ImageSet
from utils.data.sources import FolderImages


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packed, "PART_BYTES", 8 * 3 * 16 * 16)  # 8 images
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """30 images, of which number 11 is broken."""
    folder = draw_shapes(tmp_path / "pictures", 30)
    (folder / "0011.png").write_bytes(b"no image")
    return folder


def open_set(folder):
    source = FolderImages([folder])
    return ImageSet(source, range(len(source)), 16)


def all_of(images):
    x, numbers = zip(*one_pass(images, 7, 0), strict=True)
    return torch.cat(x), torch.cat(numbers)


def pack_quietly(images, split="train"):
    said = []
    packed.pack(images, f"custom_{split}", 0, said.append)
    return said


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(all_of(one), all_of(other), strict=True))


def test_same_pixels_without_decoding(folder, workplace, monkeypatch):
    plain, images = open_set(folder), open_set(folder)
    said = pack_quietly(images)
    assert "skipped" in said[0] and "packed into" in said[1]
    assert [p.stat().st_size for p in sorted(images.packed.folder.glob("*.u8"))] == [8 * 772] * 3 + [6 * 772]
    assert equal(plain, images)
    asked = []
    monkeypatch.setattr(images_module, "decode", lambda *args: asked.append(args) or 1 / 0)
    again = open_set(folder)
    assert pack_quietly(again) == [f"images read from {again.packed.folder}"]
    assert equal(again, images) and again.broken.nonzero().tolist() == [[11]]
    assert len(asked) == 1  # the broken one, by the set that did not know
    assert torch.equal(again[11, False][0], again[12, False][0])  # the next one takes its place


def test_damage_is_decoded_again(folder, workplace):
    plain, images = open_set(folder), open_set(folder)
    pack_quietly(images)
    first, second, third, fourth = sorted(images.packed.folder.glob("*.u8"))
    with open(first, "r+b") as f:
        f.seek(5 * 768 + 9)
        f.write(b"?!?")
    with open(second, "r+b") as f:
        f.truncate(1000)
    third.unlink()
    assert equal(plain, images)
    again = open_set(folder)
    assert "packed into" in pack_quietly(again)[-1]
    assert second.stat().st_size == third.stat().st_size == 8 * 772
    assert equal(plain, again)


def test_other_images_are_another_cache(folder, workplace):
    images = open_set(folder)
    pack_quietly(images)
    shutil.copy(folder / "0003.png", folder / "0004.png")
    changed = open_set(folder)
    pack_quietly(changed)
    assert changed.packed.folder != images.packed.folder and equal(open_set(folder), changed)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing(error, folder, workplace, monkeypatch):
    def refuse(*args):
        raise OSError(error, "the disk says no")

    images = open_set(folder)
    monkeypatch.setattr(packed.PackedImages, "write", refuse)
    assert "warning" in pack_quietly(images)[-1] and equal(open_set(folder), images)


def test_a_disk_that_is_too_small(folder, workplace, monkeypatch):
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(UserError, match="--cache_images needs 0.0 GB in packed.*leave the flag out"):
        packed.pack(open_set(folder), "custom_train", 0, print)


def test_training_learns_the_same(shapes, workplace):
    flags = "--train_steps 3 --horizontal_flip --steps_per_eval 2"
    train_stage_1(shapes, "plain", flags)
    train_stage_1(shapes, "packed", f"{flags} --cache_images")
    assert len(list(workplace.glob("packed/*/*.u8"))) == 6  # 38 images, and 2
    plain, from_pack = (hash_tensors(checkpoints_of(name).load("vqgan", 3)) for name in ("plain", "packed"))
    assert plain == from_pack


def test_a_killed_run_goes_on_packing(tmp_path):
    folder = draw_shapes(tmp_path / "pictures", 3000, size=64)
    process = start(
        "train_vqgan.py",
        vqgan_flags(folder, "x", "--train_steps 1 --cache_images --img_size 256 --ch_mult 1 1 1 1 1 1 1"),
        tmp_path,
    )
    first = None
    while first is None and process.poll() is None:
        time.sleep(0.02)
        first = next(tmp_path.glob("packed/*/part_00000000.u8"), None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first and len(list(first.parent.glob("*.u8"))) < 3
    before = first.stat().st_mtime_ns
    images = ImageSet(FolderImages([folder]), range(3000), 256)
    again = packed.PackedImages(images, first.parent)
    packed._write_missing(again, images, 0, print)
    assert first.stat().st_mtime_ns == before and len(list(first.parent.glob("*.u8"))) == 3
    assert torch.equal(again.read(2999), images.load(2999))


def test_several_processes_share_the_work(shapes, workplace):
    flags = "--train_steps 2 --batch_size 4 --cache_images"
    texts = together(2, partial(train_stage_1, shapes, "two", flags), workplace)
    assert texts[0].count("images packed into") == 1 and not texts[1]
    folder = next(workplace.glob("packed/*"))
    assert len(list(folder.glob("*.u8"))) == 5
    images = ImageSet(FolderImages([shapes]), range(40), 16)
    both = packed.PackedImages(images, folder)
    assert all(both.open(part) for part in both.parts())
    assert all(torch.equal(both.read(i), images.load(i)) for i in range(40))
