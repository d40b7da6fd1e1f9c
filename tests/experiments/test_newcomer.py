"""A newcomer pastes the commands of the README's section "Your own images" into one shell, in an empty folder.

Slow: it installs an environment of its own and trains both stages as printed. To try the test itself, set
NEWCOMER_STEPS="600 400": the steps of both stages, which are then appended to the commands.
"""

import math
import os
import random
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from experiments import draw_examples, draw_openmoji
from experiments.common.calls import curve
from hparams.presets import PRESETS
from models import load_pretrained
from utils.display.images import sheet
from utils.evaluation.features import collect
from utils.evaluation.metrics import fid

COUNT = 300  # pictures
MINUTES = 60  # for all commands together, on two cores
NO_NETWORK = (
    "new connection|NameResolution|Connection ?(refused|reset|aborted)|dns error|error sending request|"
    "Network is unreachable|Temporary failure in name resolution|timed out"
)


def commands_of_the_readme():
    """The lines of the first block of the section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Your own images\n")[1]
    return section.split("```\n")[1].strip().splitlines()


def flags_of(line):
    """A command as {flag: its value or ''}, and what stands before its flags as that of ''."""
    parts = re.split(r"(?:^| )--", shlex.join(shlex.split(line)))
    return dict(part.partition(" ")[::2] for part in parts[1:]) | {"": parts[0]}


def next_command(printed, script):
    """The command of this script among the last lines that another one printed."""
    (line,) = re.findall(rf"^ +(python {script} .*)$", printed, re.MULTILINE)
    return line


class Shell:
    """A shell into which lines are pasted, one after the other. `seconds` are for all of them."""

    def __init__(self, folder, seconds):
        dropped = ("UNLEASHING_ROOT", "VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        own = os.path.dirname(os.path.abspath(sys.executable))  # the tests' environment, which a newcomer lacks
        env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if os.path.abspath(p) != own)
        env["PYTHON"] = os.path.realpath(sys.executable)  # of `make`: a version that the program supports
        self.process = subprocess.Popen(
            ["bash", "--norc"], cwd=folder, env=env, start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.output = selectors.DefaultSelector()
        self.output.register(self.process.stdout, selectors.EVENT_READ)
        self.end = time.monotonic() + seconds

    def paste(self, line):
        """Run one line; returns its exit code and what it printed."""
        print(f"\n$ {line}", flush=True)
        self.process.stdin.write(f'{line}\necho "exit code $?."\n'.encode())
        self.process.stdin.flush()
        text = ""
        while not (done := re.search(r"exit code (\d+)\.\n", text)):
            assert self.output.select(max(0, self.end - time.monotonic())), (
                f"{MINUTES} minutes are over\n{text[-3000:]}"
            )
            part = os.read(self.process.stdout.fileno(), 1 << 16).decode(errors="replace")
            assert part, f"the shell ended\n{text[-3000:]}"
            print(part, end="", flush=True)
            text += part
        return int(done[1]), text[: done.start()]

    def run(self, line):
        code, text = self.paste(line)
        assert code == 0 and "Traceback" not in text, f"exit code {code}: {line}\n{text[-3000:]}"
        return text


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path, MINUTES * 60)
    yield shell
    os.killpg(shell.process.pid, signal.SIGKILL)
    shell.process.wait()


def draw_houses(folder):
    """`COUNT` houses as PNG files."""
    folder.mkdir()
    for i in range(COUNT):
        draw_examples.house(random.Random(i)).save(folder / f"{i}.png")
    return folder


def draw_flags(folder):
    """The emoji of flags, another kind of pictures, as PNG files of 128 pixels."""
    folder.mkdir()
    emoji = draw_openmoji.package_folder()
    font = draw_openmoji.load_font(emoji, 128)
    for name, text in draw_openmoji.sequences(emoji):
        if ord(text[0]) in range(0x1F1E6, 0x1F200):
            draw_openmoji.draw(text, font, 128).save(folder / f"{name}.png")
    return folder


def read(folder, side):
    """The pictures of a folder, uint8 (N, 3, side, side)."""
    images = [Image.open(path).convert("RGB").resize((side, side), Image.LANCZOS) for path in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def distances(of, others):
    """The Frechet distance of each set of images (N, 3, H, W) to the first, of the colours of 8 x 8 parts: what is
    where, without details, which small models lack."""
    parts = [F.interpolate(images.float() / 255, (8, 8), mode="area").flatten(1) for images in (of, *others)]
    first, *rest = [collect([(colours, None)], "images") for colours in parts]
    return [fid(first, other, None)["fid"] for other in rest]


def assert_resemblance(model, photos, other, drawn):
    """Samples are nearer to the pictures than codes in disorder and than other pictures are."""
    side, n = model.H.img_size, 250
    pictures = read(photos, side)[:n]
    samples = model.sample(n, temp=model.H.temp)
    assert np.abs(np.asarray(drawn, float) - sheet(samples[:25], 5).permute(1, 2, 0).numpy()).mean() < 1
    ids = model.encode(pictures)
    shuffled = ids.flatten()[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))].view_as(ids)
    names = ("samples", "shuffled codes", "other pictures")
    found = dict(zip(names, distances(pictures, [samples, model.decode(shuffled), read(other, side)[:n]])))
    print("distances to the pictures:", {name: round(d, 2) for name, d in found.items()})
    assert found["samples"] < found["shuffled codes"] and found["samples"] < found["other pictures"], found


@pytest.mark.slow
@pytest.mark.timeout((MINUTES + 15) * 60)
def test_from_an_empty_folder_to_samples_that_resemble_the_pictures(shell, tmp_path):
    photos = draw_houses(tmp_path / "my photos")
    *setup, stage_1, stage_2, samples = [
        line.replace("REPOSITORY", shlex.quote(str(ROOT))).replace("~/photos", shlex.quote(str(photos)))
        for line in commands_of_the_readme()
    ]
    assert [line.split()[0] for line in setup] == ["git", "cd", "make", "source"]
    for line in setup:
        code, text = shell.paste(line)
        if code and re.search(NO_NETWORK, text):
            pytest.skip(f"`{line}` reaches no network, so that the environment cannot be installed")
        assert code == 0, text[-3000:]

    steps = [str(PRESETS["small"][family]["train_steps"]) for family in ("vqgan", "sampler")]
    fewer = os.environ.get("NEWCOMER_STEPS", "").split()
    more = [f" --train_steps {n}" for n in fewer] or ["", ""]
    text = shell.run(stage_1 + more[0])
    last = fewer or steps
    line = next_command(text, "train_sampler.py")
    assert flags_of(line) == flags_of(stage_2) | dict(train_steps=steps[1], ae_load_step=last[0], preset="small")
    text = shell.run(line + more[1])
    line = next_command(text, "experiments/get_samples.py")
    assert flags_of(line) == flags_of(samples) | dict(ae_load_step=last[0], load_step=last[1])
    shell.run(line)

    logs = tmp_path / "unleashing-transformers" / "logs"
    drawn = Image.open(logs / "vqgan_photos_absorbing_samples" / "images" / "samples_0-24.png")
    side = 5 * (PRESETS["small"]["vqgan"]["img_size"] + 2) + 2
    assert drawn.size == (side, side)
    assert (logs / "vqgan_photos" / "images" / f"reconstructions_{last[0]}.png").is_file()
    for name in ("vqgan_photos", "vqgan_photos_absorbing", "vqgan_photos_absorbing_samples"):
        page = (logs / name / "report.html").read_text()
        assert "</html>" in page and "data:image/png" in page
    for name, value in (("vqgan_photos", "val_l1"), ("vqgan_photos_absorbing", "val_bits")):
        values = curve(logs / name, value)
        print(f"{value}: {[round(v, 4) for v in values]}")
        assert min(values) < values[0], (name, values)
    assert values[-1] < math.log2(PRESETS["small"]["vqgan"]["codebook_size"])

    others = draw_flags(tmp_path / "flags")
    assert_resemblance(load_pretrained(logs / "vqgan_photos_absorbing"), photos, others, drawn)
