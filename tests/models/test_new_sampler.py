"""A new sampler is one file, and need not be a Transformer."""

import json

from conftest import draw_shapes
from copies import Copy
from scripts import sampler_flags, train_stage_1

from utils.core.files import load_tensors

TOY = '''"""A toy: each code is drawn from a distribution of its own place."""

import math

import torch
from torch import nn

from models.samplers.base import Sampler, SamplerLoss, draw_codes, register


class Places(nn.Module):
    """ids (B, L) -> logits (B, L, K), whatever the ids."""

    def __init__(self, L, K):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(L, K))

    def forward(self, ids):
        return self.logits.expand(len(ids), -1, -1)


@register("toy")
class Toy(Sampler):
    def __init__(self, codebook_size, block_size):
        super().__init__(codebook_size, block_size)
        self.net = Places(block_size, codebook_size)

    def nll(self, ids, rng=None, passes=0, progress=None):
        return nn.functional.cross_entropy(self.net(ids).transpose(1, 2), ids, reduction="none").sum(1)

    def loss(self, ids, rng):
        bits = self.nll(ids) / (math.log(2) * self.block_size)
        return SamplerLoss(bits.mean(), bits.detach())

    def draws_per_sample(self):
        return (self.block_size,)

    @torch.no_grad()
    def sample(self, uniforms, temp=1.0, progress=None):
        return draw_codes(self.net(uniforms), uniforms, temp)

    def predict(self, ids, rows, cols):
        return self.net.logits[cols]
'''


def test_a_new_sampler_is_one_file(tmp_path, monkeypatch):
    """It trains, is saved, and draws samples and larger images."""
    copy = Copy(tmp_path, "models/samplers/toy.py", TOY)
    images = draw_shapes(tmp_path / "images", 8)
    monkeypatch.chdir(tmp_path)
    train_stage_1(images, "ae", "--train_steps 1")

    def run(script, log_dir, more):
        return copy.run(script, sampler_flags(images, log_dir, "ae", 1, more, sampler="toy"))

    assert "toy: 256 parameters" in run("train_sampler.py", "prior", "--dry_run")
    run("train_sampler.py", "prior", "--train_steps 40 --lr 0.1 --ema --steps_per_eval 20")
    rows = [json.loads(line) for line in (tmp_path / "logs/prior/stats.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] <= 4.01  # 16 codes
    weights = load_tensors(tmp_path / "logs/prior/saved_models/toy_40.th")
    assert weights["net.logits"].shape == (16, 16) and weights["net.logits"].std() > 0.1

    load = "--load_dir prior --load_step 40 --ema"
    run("experiments/get_samples.py", "drawn", f"{load} --n_samples 3 --save_latents")
    assert len(list((tmp_path / "logs/drawn/images").glob("sample_*.png"))) == 3
    ids = load_tensors(tmp_path / "logs/drawn/latents.pt")["ids"]
    assert ids.shape == (3, 16) and ids.max() < 16
    run("experiments/generate_big_samples.py", "big", f"{load} --n_samples 1 --shape 5 6")
