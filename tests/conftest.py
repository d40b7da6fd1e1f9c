"""Shared by all tests: the repository on the path, golden data, small configurations, tiny images."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)
os.environ["UNLEASHING_ROOT"] = "."  # the folder that a test works in, also if it holds no logs/ yet

from experiments.common import results  # noqa: E402 (after the repository is on the path)
from hparams.config import ALL_FLAGS  # noqa: E402
from utils.display import report  # noqa: E402
from utils.training import run  # noqa: E402

DEFAULTS = {flag.name: flag.default for flag in ALL_FLAGS}

# The report at the end of a run takes longer than the runs of most tests.
run.report_at_end = results.report_at_end = lambda folder, say: None


@pytest.fixture
def reports(monkeypatch):
    """Runs in this process write their reports."""
    for module in (run, results):
        monkeypatch.setattr(module, "report_at_end", report.report_at_end)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def words(text):
    """Flags as one string, or as a sequence of anything -> list of str."""
    return text.split() if isinstance(text, str) else [str(w) for w in text]


class Golden:
    """One golden case: configuration H (the defaults of the flags, `defaults`, the saved one), arrays as tensors."""

    def __init__(self, name, **defaults):
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        saved = json.loads((GOLDEN / f"{name}.json").read_text())
        self.H = SimpleNamespace(**{**DEFAULTS, **defaults, **saved})

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def state(self, prefix="state/"):
        keys = [k for k in self.arrays.files if k.startswith(prefix)]
        return {k.removeprefix(prefix): self[k].float() if self[k].dtype == torch.float16 else self[k] for k in keys}


@pytest.fixture
def golden():
    return Golden


def assert_close(actual, expected, rtol=1e-4):
    """Largest error within rtol of the largest expected value: the parity that is promised."""
    actual, expected = (torch.as_tensor(v).detach().double() for v in (actual, expected))
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual - expected).nan_to_num().abs().max()
    assert error <= rtol * expected.nan_to_num().abs().max(), f"error {error}"


def draw_shapes(folder, count, size=24, seed=0):
    """`count` PNG files of random discs and boxes in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        image = Image.new("RGB", (size, size), tuple(random.integers(150, 256, 3).tolist()))
        x, y, r = random.integers(4, size - 4, 2).tolist() + [int(random.integers(3, size // 3))]
        colour = tuple(random.integers(0, 200, 3).tolist())
        pen = ImageDraw.Draw(image)
        (pen.ellipse if i % 2 else pen.rectangle)((x - r, y - r, x + r, y + r), fill=colour)
        image.save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of 40 small pictures."""
    return draw_shapes(tmp_path_factory.mktemp("shapes"), 40)


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A folder with logs/ae (step 4), logs/prior (absorbing) and logs/ar (autoregressive), step 3 each."""
    from scripts import train_stage_1, train_stage_2

    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        train_stage_1(shapes, "ae", "--train_steps 4 --ema --steps_per_update_ema 1")
        train_stage_2(shapes, "prior", "ae", 4, "--train_steps 3 --ema --steps_per_update_ema 1")
        train_stage_2(shapes, "ar", "ae", 4, "--train_steps 3", sampler="autoregressive")
    finally:
        os.chdir(before)
    return folder


# Flags of the smallest models that exercise everything: 16 x 16 pixels, 4 x 4 codes.
TINY_VQGAN = words(
    "--img_size 16 --nf 32 --ch_mult 1 1 1 --res_blocks 1 --emb_dim 8 --codebook_size 16 --batch_size 4 "
    "--ndf 8 --disc_layers 1 --perceptual_weight 0 --lr 1e-3 --num_workers 0 --no_visdom --device cpu"
)
TINY_SAMPLER = words(
    "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 2 --total_steps 16 --sample_steps 16 --batch_size 8 "
    "--lr 1e-3 --warmup_iters 5 --num_workers 0 --no_visdom --device cpu"
)


EXIT_PATIENCE = 60.0  # seconds that the tests' own process may take to end


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


def pytest_unconfigure(config):
    """A process that does not end would hold up whoever waits for the tests: show where it stands, and leave.

    (That the program itself ends is tested in processes of their own.)
    """

    def leave():
        time.sleep(EXIT_PATIENCE)
        print("\nthe tests are done but their process does not end; it stands at:", file=sys.__stderr__)
        faulthandler.dump_traceback(sys.__stderr__)
        os._exit(getattr(config, "exit_status", 1))

    threading.Thread(target=leave, daemon=True).start()
