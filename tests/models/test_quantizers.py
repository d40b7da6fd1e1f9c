"""A new quantizer is one file; codebooks of any size."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, draw_shapes
from scripts import sampler_flags, train_stage_1, train_stage_2, vqgan_flags

from experiments.common.measure import read_latents
from hparams import config
from models.quantizers import QUANTIZERS, Quantizer
from utils.core.files import load_tensors

TOY = '''"""A toy: the nearest of codes that live in a space of few dimensions."""

import torch
from torch import nn

from models.quantizers.base import Quantized, Quantizer, register

FLAGS = {
    "toy_width": {"default": 4, "help": "dimensions of the codes", "min": 1, "role": "autoencoder"},
    "toy_weight": {"default": 0.5, "help": "weight of the loss", "min": 0.0, "exclusive": True},
}


@register("toy")
class Toy(Quantizer):
    def __init__(self, H):
        super().__init__(H)
        self.weight = H.toy_weight
        self.narrow = nn.Linear(H.emb_dim, H.toy_width)
        self.codebook = nn.Parameter(torch.randn(H.codebook_size, H.toy_width))
        self.widen = nn.Linear(H.toy_width, H.emb_dim)

    def forward(self, z, step=None, rng=None):
        ids = self.encode(z)
        z_q = self.embed_ids(ids).permute(0, 3, 1, 2)
        loss = self.weight * (z_q - z).square().mean()
        return Quantized(z + z_q - z.detach(), loss, ids, z.new_zeros(()))

    def encode(self, z):
        narrow = self.narrow(z.permute(0, 2, 3, 1))
        return torch.cdist(narrow.flatten(0, 2), self.codebook).argmin(1).view(narrow.shape[:3])

    def embed_ids(self, ids):
        return self.widen(self.codebook[ids])
'''


def test_a_new_quantizer_is_one_file(tmp_path):
    """It trains past an epoch, stage 2 takes its shape from the checkpoint, and its codes feed a sampler."""
    for folder in ("hparams", "models", "utils", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train_vqgan.py", "train_sampler.py", "datasets.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "models" / "quantizers" / "toy.py").write_text(TOY)
    images = draw_shapes(tmp_path / "images", 8)
    env = dict(os.environ, OMP_NUM_THREADS="1")

    def run(script, flags, code=0):
        command = [sys.executable, script, *flags]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    assert "--toy_width INT" in run("train_vqgan.py", ["--help_all"])
    line = run("train_vqgan.py", vqgan_flags(images, "ae", "--toy_weight 2"), code=2)
    assert "--toy_weight 2.0 contradicts --quantizer nearest: it is for toy only" in line
    run("train_vqgan.py", vqgan_flags(images, "ae", "--quantizer toy --toy_width 3 --train_steps 3 --steps_per_log 1"))
    rows = [json.loads(line) for line in (tmp_path / "logs/ae/stats.jsonl").read_text().splitlines()]
    assert any("perplexity" in row for row in rows)
    vectors = load_tensors(tmp_path / "logs/ae/saved_models/vqgan_3.th")["ae.quantize.codebook"]
    assert vectors.shape == (16, 3)

    line = run("train_sampler.py", sampler_flags(images, "prior", "ae", 3, "--toy_width 5"), code=2)
    assert "--toy_width 5 contradicts --ae_load_dir ae, which was trained with --toy_width 3" in line
    run("train_sampler.py", sampler_flags(images, "prior", "ae", 3, "--train_steps 3 --steps_per_save_output 3"))
    assert (tmp_path / "logs/prior/images/samples_3.png").is_file()
    saved = json.loads((tmp_path / "logs/prior/config.json").read_text())["hparams"]
    assert (saved["quantizer"], saved["toy_width"]) == ("toy", 3)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_contract(name):
    """ids and vectors agree; the default attributes hold without flags."""
    defaults = {f.name: f.default for f in config.flags_of([config.QuantizerConfig])}
    quantizer = QUANTIZERS[name](SimpleNamespace(**{**defaults, "codebook_size": 7, "emb_dim": 4})).eval()
    assert isinstance(quantizer, Quantizer)
    assert (quantizer.start_step, quantizer.restart_steps, quantizer.codebook_size) == (0, 0, 7)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    out = quantizer(z)
    assert torch.equal(out.ids, quantizer.encode(z)) and out.ids.shape == (2, 3, 5)
    torch.testing.assert_close(out.z_q, quantizer.embed_ids(out.ids).permute(0, 3, 1, 2))
    assert out.loss.shape == out.mean_distance.shape == () and out.loss.requires_grad


def test_a_codebook_that_is_too_large_for_int16(tmp_path, monkeypatch, shapes):
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "ae", "--codebook_size 40000 --train_steps 1 --steps_per_save_output 1")
    train_stage_2(shapes, "prior", "ae", 1, "--train_steps 1")
    (path,) = tmp_path.glob("latents/*.pt")
    ids = load_tensors(path)["tensors"]["ids"]
    assert ids.dtype == torch.int32 and ids.max() > 32767
    H = SimpleNamespace(block_size=16, codebook_size=40000, allow_other_ae=True)
    assert torch.equal(read_latents(str(path), len(ids), H, SimpleNamespace(hash=None)), ids.long())
