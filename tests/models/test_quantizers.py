"""A new quantizer is one file; what every quantizer of the registry must do; single ones equal their references."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DEFAULTS, draw_shapes
from copies import Copy
from scripts import experiment, sampler_flags, train_stage_1, train_stage_2, vqgan_flags
from test_metrics import SmallExtractor
from vector_quantize_pytorch import FSQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from experiments import calc_VQGAN_FID
from experiments.common.measure import read_latents
from models.build import from_fields
from models.quantizers import QUANTIZERS, Quantizer
from models.quantizers.fsq import levels_of
from models.quantizers.rotation import rotate
from utils.core.files import load_tensors
from utils.core.seed import StepRandom
from utils.evaluation import features

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
    def __init__(self, codebook_size, emb_dim, toy_width, toy_weight):
        super().__init__(codebook_size)
        self.weight = toy_weight
        self.narrow = nn.Linear(emb_dim, toy_width)
        self.codebook = nn.Parameter(torch.randn(codebook_size, toy_width))
        self.widen = nn.Linear(toy_width, emb_dim)

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
    run = Copy(tmp_path, "models/quantizers/toy.py", TOY).run
    images = draw_shapes(tmp_path / "images", 8)
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


# ---------------------------------------------------------------------- every quantizer


def build(name, codebook_size=12, emb_dim=8, **flags):
    torch.manual_seed(0)
    return from_fields(QUANTIZERS[name], {**DEFAULTS, **flags, "codebook_size": codebook_size, "emb_dim": emb_dim})


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_contract(name):
    """ids and vectors agree; the default attributes hold without flags."""
    quantizer = build(name, 7, 4).eval()
    assert isinstance(quantizer, Quantizer)
    assert (quantizer.start_step, quantizer.restart_steps, quantizer.codebook_size) == (0, 0, 7)
    z = 3 * torch.randn(2, 4, 3, 5, requires_grad=True)
    out = quantizer(z)
    assert torch.equal(out.ids, quantizer.encode(z)) and out.ids.shape == (2, 3, 5)
    assert out.ids.dtype == torch.int64 and out.ids.min() >= 0 and out.ids.max() < 7
    torch.testing.assert_close(out.z_q, quantizer.embed_ids(out.ids).permute(0, 3, 1, 2))
    assert out.loss.shape == out.mean_distance.shape == () and out.loss.requires_grad


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_reach_the_latents_and_every_parameter_that_learns(name):
    quantizer = build(name)
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    out = quantizer(z, step=1)
    ((out.z_q * torch.randn_like(z)).sum() + out.loss).backward()
    for tensor in (z, *(p for p in quantizer.parameters() if p.requires_grad)):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0
    assert (z.grad.flatten(2).abs().amax((0, 2)) > 0).all(), "each channel"


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_state_dict_holds_all_that_was_learned(name):
    """Averages of the codebook among them: the next step is the same, too."""
    one, other = build(name), build(name)
    z = torch.randn(3, 2, 8, 4, 4)
    one(z[0], step=1)
    other.load_state_dict(one.state_dict())
    for x, step in ((z[1], 2), (z[2], 3)):
        outs = [q(x, step=step, rng=StepRandom("test", step)) for q in (one, other)]
        assert torch.equal(outs[0].z_q, outs[1].z_q) and torch.equal(outs[0].ids, outs[1].ids)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_mixed_precision_chooses_the_same_codes(name):
    quantizer, z = build(name, 64).eval(), torch.randn(2, 8, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, out = quantizer.encode(z), quantizer(z)
    assert torch.equal(ids, quantizer.encode(z)) and torch.equal(ids, out.ids)
    assert torch.equal(out.z_q.float(), quantizer(z).z_q)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_evaluation_changes_nothing(name):
    quantizer = build(name).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 8, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_its_codes_feed_samplers_and_experiments(name, tmp_path, monkeypatch, shapes):
    """It trains in mixed precision and in parts of a batch."""
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "ae", f"--quantizer {name} --train_steps 3 --amp --accumulate_steps 2 --ema")
    monkeypatch.setattr(features, "Inception", SmallExtractor)
    flags = vqgan_flags(shapes, "measured", "--load_dir ae --load_step 3 --n_samples 4 --perceptual_weight 0")
    calc_VQGAN_FID.main(experiment(calc_VQGAN_FID, flags))
    (row,) = map(json.loads, Path("logs/measured/metrics.jsonl").read_text().splitlines())
    assert 1 <= row["values"]["codes_used"] <= 16 and row["values"]["rfid"] >= 0
    for sampler in ("absorbing", "autoregressive"):
        train_stage_2(shapes, sampler, "ae", 3, "--train_steps 3 --steps_per_save_output 3", sampler=sampler)
        assert Path(f"logs/{sampler}/images/samples_3.png").is_file()


# ---------------------------------------------------------------------- single quantizers


def test_ema_equals_the_reference():
    """Codebook and uses after many batches (the reference is of the paper's form: sums of latents and of uses)."""
    quantizer = build("ema", codebook_decay=0.9)
    reference = VectorQuantize(
        8, 12, decay=0.9, eps=1e-12, rotation_trick=False, threshold_ema_dead_code=0, accept_image_fmap=True
    )
    codes = torch.randn(12, 8)
    quantizer.embedding.weight.data.copy_(codes)
    reference._codebook.embed.copy_(codes)
    reference._codebook.embed_avg.copy_(codes)
    for _ in range(50):
        z = torch.randn(2, 8, 3, 3)
        out, (_, ids, loss) = quantizer(z), reference(z)
        assert torch.equal(out.ids, ids)
        torch.testing.assert_close(out.loss, loss.squeeze())
    torch.testing.assert_close(quantizer.embedding.weight[None].data, reference._codebook.embed)
    torch.testing.assert_close(quantizer.cluster_size[None], reference._codebook.cluster_size)
    assert (quantizer.embedding.weight - codes).abs().max() > 0.5, "the codes have moved"


def test_ema_leaves_unused_codes_where_they_are():
    """Also after so many steps that their average number of uses is no float32 any more."""
    quantizer = build("ema", 3, 2, codebook_decay=0.5)
    codes = torch.tensor([[0.0, 0.0], [9.0, 9.0], [-9.0, 9.0]])
    quantizer.embedding.weight.data.copy_(codes)
    for _ in range(200):
        quantizer(torch.ones(1, 2, 2, 2))
    assert torch.equal(quantizer.embedding.weight[1:], codes[1:])
    torch.testing.assert_close(quantizer.embedding.weight[0].data, torch.ones(2))
    quantizer(8 * torch.ones(1, 2, 1, 1))  # the first use counts as much as all before it
    torch.testing.assert_close(quantizer.embedding.weight[1].data, torch.full((2,), 8.0))


def test_rotation_equals_the_reference():
    z = torch.randn(2, 8, 3, 3, requires_grad=True)
    codes, weights = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    value = rotate(z, codes)
    expected = rotate_to(z.permute(0, 2, 3, 1), codes.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad((v * weights).sum(), z)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0] - weights).abs().max() > 0.1, "not the straight-through gradient"


def test_rotation_where_none_is_defined():
    """No latent, no code, opposite directions: the value is the code, the gradient is finite."""
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]).T[None].requires_grad_()
    codes = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-2.0, -4.0]]).T[None]
    value = rotate(z, codes)
    assert torch.equal(value, codes)
    assert torch.autograd.grad(value.sum(), z)[0].isfinite().all()


def test_fsq_equals_the_reference():
    quantizer, reference = build("fsq", 1000, 16), FSQ([8, 5, 5, 5], dim=16)
    reference.load_state_dict(quantizer.state_dict())
    z = (3 * torch.randn(2, 16, 8, 8)).requires_grad_()
    out, (expected, ids) = quantizer(z), reference(z)
    assert torch.equal(out.ids, ids.long()) and len(ids.unique()) > 50
    torch.testing.assert_close(out.z_q, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(*[torch.autograd.grad((v * weights).sum(), z)[0] for v in (out.z_q, expected)])


def test_fsq_reaches_every_code():
    """Its grid has one point for each id, whatever the number of levels."""
    for size, least in ((1, 5), (2, 5), (12, 3), (60, 3), (1021, 5), (1000, 5)):
        quantizer = build("fsq", size, 3, fsq_least_levels=least)
        levels = quantizer.levels.tolist()
        quantizer.project_in = quantizer.project_out = torch.nn.Identity()
        points = torch.cartesian_prod(*(torch.linspace(-9, 9, 9 * n) for n in levels)).reshape(-1, len(levels), 1, 1)
        ids = quantizer.encode(torch.cat((points, torch.atanh(torch.rand(4000, len(levels), 1, 1) * 2 - 1))))
        assert ids.min() >= 0 and ids.max() < size
        if size < 1000:
            assert len(ids.unique()) == size
        vectors = quantizer.embed_ids(torch.arange(size))
        assert vectors.abs().max() <= 1 and len(vectors.unique(dim=0)) == size


@pytest.mark.parametrize(
    "size,levels",
    [
        (240, [8, 6, 5]),
        (1000, [8, 5, 5, 5]),
        (4375, [7, 5, 5, 5, 5]),
        (15360, [8, 8, 8, 6, 5]),
        (64000, [8, 8, 8, 5, 5, 5]),
        (1024, [16, 8, 8]),
        (1021, [1021]),
    ],
)
def test_fsq_takes_the_levels_of_the_paper(size, levels):
    assert levels_of(size, 5) == levels
    assert levels_of(1024, 4) == [4] * 5


def test_a_codebook_that_is_too_large_for_int16(tmp_path, monkeypatch, shapes):
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "ae", "--codebook_size 40000 --train_steps 1 --steps_per_save_output 1")
    train_stage_2(shapes, "prior", "ae", 1, "--train_steps 1")
    (path,) = tmp_path.glob("latents/*.pt")
    ids = load_tensors(path)["tensors"]["ids"]
    assert ids.dtype == torch.int32 and ids.max() > 32767
    H = SimpleNamespace(block_size=16, codebook_size=40000, allow_other_ae=True)
    assert torch.equal(read_latents(str(path), len(ids), H, SimpleNamespace(hash=None)), ids.long())
