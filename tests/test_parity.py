"""The numbers of the original program, from golden data (float32, CPU), to 1e-4 relative."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_close

import train_vqgan
from hparams import config, sampler_family, vqgan_family
from hparams.resolve import resolve
from models.autoencoder import gaussian_nll
from models.build import build_sampler, build_vqgan
from models.canvas import sample_canvas
from models.quantizers import perplexity
from train_sampler import sampler_step
from utils.training.amp import Precision

FLOAT32 = Precision(False, "auto", torch.device("cpu"))


def mean_squared(x, x_hat):
    """The stand-in for LPIPS in the golden data."""
    return (x - x_hat).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def vqgan_case(golden):
    case = golden("vqgan")
    model = build_vqgan(case.H)
    model.load_state_dict(case.state())
    return case, model


@torch.no_grad()
def test_autoencoder_activations(vqgan_case):
    case, model = vqgan_case
    assert_close(model.ae.encoder(case["in/x"]), case["out/encoder"])
    x_hat, quantized = model.ae(case["in/x"])
    assert torch.equal(quantized.ids.flatten(1), case["out/indices"])
    assert torch.equal(model.ae.encode(case["in/x"]), case["out/indices"])
    assert_close(quantized.loss, case["out/codebook_loss"])
    assert_close(quantized.mean_distance, case["out/mean_distance"])
    assert_close(perplexity(torch.bincount(quantized.ids.flatten(), minlength=64)), case["out/perplexity"])
    assert_close(x_hat, case["out/reconstruction"])
    assert_close(model.ae.decode(case["out/indices"], 16, 16), case["out/reconstruction"])


@torch.no_grad()
def test_pixel_likelihood(vqgan_case):
    case, model = vqgan_case
    z_q = model.ae.embed(case["out/indices"], 16, 16)
    mean, logsigma = model.ae.generator.distribution(z_q)
    assert_close(logsigma, case["out/logsigma"])
    nats = gaussian_nll(case["in/x"], mean, logsigma)
    assert_close(nats, case["out/nll_raw"])
    assert_close(nats.mean() / (np.log(2) * 3 * 32 * 32), case["out/nll_bits"])


def test_vqgan_training_trajectory(vqgan_case):
    case, model = vqgan_case
    H = case.H
    model.perceptual = mean_squared_module()
    ae_optim = torch.optim.Adam(model.ae.parameters(), lr=H.lr)
    disc_optim = torch.optim.Adam(model.disc.parameters(), lr=H.lr)
    for step in range(6):
        x = case["in/train_x"][step].float()
        got, x_hat, _ = train_vqgan.generator_step(model, ae_optim, FLOAT32, H, x, step, rng=None)
        if step > H.disc_start_step:
            got.update(train_vqgan.discriminator_step(model, disc_optim, FLOAT32, H, x, x_hat, rng=None))
        for name in ("loss", "l1", "perceptual", "nll_loss", "codebook_loss"):
            assert_close(got[name], case[f"out/train/{name}"][step])
        # Before the discriminator joins it is not run, where the original multiplies it by 0.
        if step >= H.disc_start_step:
            assert_close(got["g_loss"], case["out/train/g_loss"][step])
            assert_close(got["d_weight"], case["out/train/d_weight"][step])
        else:
            assert "g_loss" not in got
            assert case["out/train/d_weight"][step] == 0
        assert ("d_loss" in got) == (not case["out/train/d_loss"][step].isnan())
        if "d_loss" in got:
            assert_close(got["d_loss"], case["out/train/d_loss"][step])
    assert_close(model.ae.generator.last_layer, case["out/train/last_layer"])
    assert_close(model.ae.quantize.embedding.weight, case["out/train/codebook"])


def mean_squared_module():
    module = torch.nn.Module()
    module.forward = mean_squared
    return module


@pytest.fixture
def absorbing_case(golden):
    case = golden("absorbing", sampler="absorbing", sample_steps=64)
    model = build_sampler(case.H)
    model.load_state_dict(case.state())
    return case, model


def test_absorbing_losses(absorbing_case):
    case, model = absorbing_case
    x_0, t, mask = (case[f"in/{k}"] for k in ("x_0", "t", "mask"))
    with torch.no_grad():
        assert_close(model._denoise_fn(x_0.masked_fill(mask, model.mask_id)), case["out/logits"])
        for name in ("elbo", "mlm", "reweighted_elbo"):
            model.loss_type = name
            out = model.loss(x_0, t=t, mask=mask)
            assert_close(out.loss, case[f"out/loss/{name}"])
            assert_close(out.bits.mean(), case["out/vb_loss"])


def test_absorbing_training_trajectory(absorbing_case, monkeypatch):
    case, model = absorbing_case
    optimiser = torch.optim.Adam(model.parameters(), lr=case.H.lr)
    plain_loss = model.loss
    for step in range(6):
        t, mask = case["in/train/t"][step], case["in/train/mask"][step]
        monkeypatch.setattr(model, "loss", lambda ids, rng, t=t, mask=mask: plain_loss(ids, t=t, mask=mask))
        out = sampler_step(model, optimiser, FLOAT32, case["in/train/x_0"][step], rng=None)
        assert_close(out.loss, case["out/train/loss"][step])
        assert_close(out.bits.mean(), case["out/train/vb_loss"][step])
    for name in ("loss_history", "Lt_history", "Lt_count"):
        assert_close(getattr(model, name), case[f"out/train/{name}"])
    assert_close(model._denoise_fn.head.weight, case["out/train/head"])


def test_larger_canvas(absorbing_case):
    case, model = absorbing_case
    model.load_state_dict(case.state("state_big/"))
    shape = case["in/big_shape"].tolist()
    uniforms = torch.full((2, *shape), 0.5)
    ids = sample_canvas(model, uniforms, window=(8, 8), temp=1e-3)
    assert torch.equal(ids, case["out/big_ids"])


def test_autoregressive(golden):
    case = golden("autoregressive", sampler="autoregressive")
    model = build_sampler(case.H)
    model.load_state_dict(case.state())
    with torch.no_grad():
        assert_close(model.net(case["in/x"]), case["out/logits"])
        assert_close(model.loss(case["in/x"]).loss, case["out/loss"])
    greedy = model.sample(torch.full((1, 64), 0.5), temp=1e-6)
    assert torch.equal(greedy, case["out/greedy_ids"])


# ---------------------------------------------------------------------- names of the published tensors


NAMES = json.loads((GOLDEN / "state_dict_names.json").read_text())


def default_config(family, **given):
    classes = vqgan_family() if family == "vqgan" else sampler_family()
    if family == "sampler":
        given = dict(given, ae_load_dir="x", ae_load_step=1)
    return resolve(config.flags_of(classes), dict(dataset="churches", dry_run=True, **given), family)


def shapes_of(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_vqgan_names_and_shapes():
    import lpips

    (key,) = [k for k in NAMES if k.startswith("vqgan_STEP.th /")]
    with torch.device("meta"):
        model = build_vqgan(default_config("vqgan"))
    got = shapes_of(model)
    assert got == {k: v for k, v in NAMES[key].items() if not k.startswith("perceptual.")}
    perceptual = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    got.update({f"perceptual.{k}": v for k, v in shapes_of(perceptual).items()})
    assert got == NAMES[key]


def test_gumbel_names_and_shapes():
    (key,) = [k for k in NAMES if "gumbel" in k]
    with torch.device("meta"):
        model = build_vqgan(default_config("vqgan", quantizer="gumbel"))
    assert {k: v for k, v in shapes_of(model).items() if "quantize" in k} == NAMES[key]


@pytest.mark.parametrize("name", ["absorbing", "autoregressive"])
def test_sampler_names_and_shapes(name):
    (key,) = [k for k in NAMES if k.startswith(name)]
    with torch.device("meta"):
        model = build_sampler(default_config("sampler", sampler=name))
    assert shapes_of(model) == NAMES[key]


def test_autoregressive_checkpoint_may_lack_the_causal_masks(golden):
    case = golden("autoregressive", sampler="autoregressive")
    state = case.state()
    assert not any("attn.mask" in k for k in state)
    model = build_sampler(case.H)
    model.load_state_dict(state)
    assert model.net.blocks[0].attn.mask.sum() == 64 * 65 / 2
