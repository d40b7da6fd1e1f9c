"""Folders of images from anywhere: names, things that are no files, files that claim much. Each is decoded or counted
as broken, in bounded memory and time."""

import io
import json
import os
import resource
import shutil
import socket
import time
import zlib
from pathlib import Path

import pytest
from conftest import draw_shapes
from PIL import Image

from experiments import calc_nearest_neighbours
from faults.forks import forked
from faults.hostile import animated_webp, assert_harmless, assert_one_line, chunk, measuring, png
from faults.stages import stage_1, stage_2
from utils.data.images import ImageSet
from utils.data.sources import FolderImages

MIB = 1 << 20

NAMES = [
    b"new\nline.png",
    b"a b  c.png",
    b"-rf.png",
    b"--help.png",
    b"\xff\xfe\x80.png",
    b"\x1b[31m\x1b]0;x\x07.png",
    "\u202egnp.exe.png".encode(),
    "\u6f22\u5b57 \u00e4\U0001f600.png".encode(),
    b"$(touch executed).png",
    b"'\";`touch executed`.png",
    b"%s%n{x}.png",
    b"\x85\x9b2J.png",
    b"*?[a].png",
    b" .png",
]


# ---------------------------------------------------------------------- names


def write_under(folder, names, content):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as f:
            f.write(content)


def small_png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 30)).save(file, "PNG")
    return file.getvalue()


def custom(folder):
    return "--dataset", "custom", f"--custom_dataset_path={folder}", "--steps_per_eval", "0"


def test_names_of_images(place, figures):
    """Good ones are used, broken ones named; the terminal and log.txt get nothing but what can be shown."""
    write_under(place / "good", NAMES, small_png())
    (place / "broken").mkdir()
    draw_shapes(place / "broken" / "good", 20 * len(NAMES), size=12)
    write_under(place / "broken", NAMES, b"no image")
    for folder in ("good", "broken"):
        flags = "--batch_size 20 --train_steps 15 --steps_per_checkpoint 0 --steps_per_save_output 0".split()
        for work in (stage_1, stage_2):
            outcome = forked(work(*custom(folder), *flags), place)
            assert outcome.code == 0, outcome.text
            assert_harmless(outcome.text)
            assert_harmless((place / "logs/run/log.txt").read_text())
            if folder == "broken":
                assert outcome.text.count("cannot be decoded") == len(NAMES)
            shutil.rmtree(place / "logs" / "run")
    assert not (place / "executed").exists()
    figures("names of images")["used, and named where broken"] += len(NAMES)


@pytest.mark.parametrize("work", [stage_1, stage_2], ids=["vqgan", "sampler"])
def test_names_in_errors(place, work):
    write_under(place / "all", NAMES, b"no image")
    assert_one_line(forked(work(*custom("all")), place), 1, "cannot be decoded")
    for name in NAMES:
        assert_one_line(forked(work(*custom(os.fsdecode(name))), place), 1, "does not exist")


def test_a_part_of_the_codes_with_broken_images_only(place):
    """25 images are encoded in parts of 8: the last image is a part of its own."""
    images = draw_shapes(place / "images", 25, size=12)
    (images / "0024.png").write_bytes(b"no image")
    outcome = forked(stage_2(*custom("images"), "--train_steps", "1"), place)
    assert outcome.code == 0 and "48 code sequences" in outcome.text, outcome.text


# ---------------------------------------------------------------------- what is no file


def strangers(folder):
    """Things called .png that are no files."""
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "s.png"))
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "terminal.png").symlink_to("/dev/tty")
    (folder / "linked_pipe.png").symlink_to("pipe.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "folder.png").mkdir()
    (folder / "loop").symlink_to(".")
    (folder / "up").symlink_to("..")
    (folder / "slash").symlink_to(folder)


def test_things_that_are_no_files(tmp_path, place, monkeypatch, figures):
    images = draw_shapes(tmp_path / "i" / "images", 8, size=12)
    strangers(images)
    outcome = forked(stage_1(*custom(images), "--train_steps", "2"), place, limit=30)
    assert outcome.code == 0 and " 8 images" in outcome.text.replace("7 images", "8 images"), outcome.text
    for name in ("pipe.png", "device.png", "linked_pipe.png", "itself.png", "folder.png", "s.png"):
        save_weights = "--alexnet_weights x --query_images"
        work = measuring(calc_nearest_neighbours, [*save_weights.split(), str(images / name)])
        assert_one_line(forked(work, place, limit=30), 1, "--query_images")
        figures("things called .png")["passed over, and refused by name"] += 1


def test_a_file_that_has_become_a_pipe(tmp_path):
    images = ImageSet(FolderImages([draw_shapes(tmp_path / "images", 2, size=12)]), range(2), 8)
    (tmp_path / "images" / "0000.png").unlink()
    os.mkfifo(tmp_path / "images" / "0000.png")
    assert images.load(0) is None and images.broken.tolist() == [True, False]


def test_a_file_of_a_thousand_gigabytes(tmp_path):
    images = ImageSet(FolderImages([draw_shapes(tmp_path / "images", 2, size=12)]), range(2), 8)
    os.truncate(tmp_path / "images" / "0000.png", 10**12)
    assert images.load(0) is None


# ---------------------------------------------------------------------- images that claim much


def frame():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def compressed_text(n):
    """A PNG's text of n bytes."""
    return chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(n)))


PALETTE = chunk(b"PLTE", bytes(range(256)) * 3) + chunk(b"tRNS", b"\0\x80")
HUGE = 13_300  # pixels: 177 million of them, what Pillow takes at most


def pictures(side):
    """Name -> (bytes, pixels that it decodes to, or 0 where it is to be refused)."""
    area = side * side
    yield "RGB", png(side, side), area
    yield "RGBA", png(side, side, colours=6), area
    yield "grey with alpha", png(side, side, colours=4), area
    yield "grey, 16 bits", png(side, side, 16, 0), area
    yield "RGB, 16 bits", png(side, side, 16, 2), area
    yield "palette with transparency", png(side, side, 8, 3, PALETTE), area
    yield "black and white", png(side, side, 1, 0), area
    yield "an animation", animated_webp(side, side, frame()), area
    yield "60000 x 60000", png(60_000, 60_000, rows=200), 0
    yield "an animation of 60000 x 60000", animated_webp(60_000, 60_000, frame()), 0
    yield "1 x 5000", png(1, 5000), 5000
    yield "1 x 20 million", png(1, 20_000_000, rows=100), 0
    yield "2 million x 1", png(2_000_000, 1), 0
    yield "a text of 256 MB", png(8, 8, extra=compressed_text(1 << 28)), 0
    yield "many texts", png(8, 8, extra=compressed_text(1 << 19) * 400), 0
    yield "no rows", png(8, 8, rows=0), 0
    if side == HUGE:
        yield "60000 x 60000, 1 bit, whole", png(60_000, 60_000, 1, 0), 0
    yield "a negative side", png(8, 8).replace(b"\0\0\0\x08\0\0\0\x08", b"\xff\xff\xff\xf8\0\0\0\x08"), 0


def measured(content, folder, memory):
    """(decoded or not, MiB above what there was, seconds of the processor) of loading an image in a child, which may
    not have more than `memory` bytes beyond what it has."""
    (folder / "i").mkdir(exist_ok=True)
    (folder / "i" / "x.png").write_bytes(content)

    def work():
        images = ImageSet(FolderImages([folder / "i"]), [0], 64)
        pages = [int(n) for n in Path("/proc/self/statm").read_text().split()[:2]]
        size, resident = (n * resource.getpagesize() for n in pages)
        resource.setrlimit(resource.RLIMIT_AS, (size + memory,) * 2)
        start = time.process_time()
        good = images.load(0) is not None
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([good, max(peak - resident, 0) / MIB, seconds]))

    outcome = forked(work, folder)
    assert outcome.code == 0, outcome.text
    return json.loads(outcome.text)


def test_memory_and_time_of_an_image(tmp_path, few_or_all, figures, capsys):
    side = few_or_all(2000, HUGE)
    worst = [0.0, 0.0]
    for name, content, pixels in pictures(side):
        good, mib, seconds = measured(content, tmp_path, 4 << 30)
        bound = 48 + 17 * pixels / MIB  # an animation: four copies of four bytes; all else: two
        assert good == bool(pixels), name
        assert mib < bound, f"{name}: {mib:.0f} MiB"
        assert seconds < 3 + 0.2e-6 * pixels, f"{name}: {seconds:.1f} s"
        worst = [max(worst[0], mib), max(worst[1], seconds)]
        figures(f"images that claim much ({side} x {side})")["decoded" if good else "broken"] += 1
    with capsys.disabled():
        print(f"\nimages of up to {side} x {side} pixels: at most {worst[0]:.0f} MiB, {worst[1]:.1f} s each")
