"""What an accelerator needs, shown without one: steps never wait for the device, are compiled once, and find all
tensors on the device."""

import contextlib
import logging

import lpips
import pytest
import torch
import torch._dynamo
from conftest import assert_close
from scripts import train_stage_1, vqgan_flags
from test_samplers import tiny
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_sampler
import train_vqgan
from hparams import get_hparams
from models.build import build_vqgan
from models.canvas import sample_canvas
from models.discriminator import LeCam, diff_augment, hinge_discriminator_loss
from models.efficientnet import EfficientNetLite0, PerceptualDistance
from models.quantizers import QUANTIZERS
from models.samplers import SAMPLERS
from utils.core.seed import StepRandom, sample_uniforms
from utils.training import compilation
from utils.training.amp import Precision
from utils.training.meters import Meters

aten, CPU = torch.ops.aten, torch.device("cpu")
INDEXED = (aten.index, aten.index_put, aten.index_put_)
EVERYTHING = "--img_size 32 --disc_start_step 0 --diff_aug --ema --steps_per_update_ema 1 --lecam_weight 0.1"
DISTANCE = "--perceptual_weight 1 --perceptual_net efficientnet_lite0"


class NoWait(TorchDispatchMode):
    """Refuses operations whose result the host must see, and tensors made from numbers of the host. On CUDA both wait
    for the device."""

    TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in INDEXED:  # integers as indices do not wait
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), f"{func} with a mask"
        else:
            assert not self.TAGS & set(func.tags) and func is not aten.lift_fresh.default, func
        return func(*args, **(kwargs or {}))


def stage_1(monkeypatch, quantizer, more=""):
    """Training of stage 1 on 32 x 32 pixels, with the distance of an untrained network."""
    monkeypatch.setattr(train_vqgan, "find_perceptual", lambda *_: PerceptualDistance(EfficientNetLite0()))
    flags = vqgan_flags("unused", "x", f"--quantizer {quantizer} {EVERYTHING} {DISTANCE} {more}")
    H = get_hparams("vqgan", "", flags)
    return train_vqgan.Training(H, CPU, None)


def vgg_distance(device):
    distance = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    distance.scaling_layer.to(device)  # it is made on the CPU, whatever the default device is
    return distance


def stage_2(name, precision):
    """A sampler, and a function that makes one update of it: number of the step -> SamplerLoss."""
    sampler = tiny(name, attn_pdrop=0.1)
    sampler.fixed_shapes = True
    optimiser = torch.optim.Adam(sampler.parameters(), fused=True)

    def step(number):
        sampler.train()
        ids = torch.randint(0, 3, (4, 4))
        return train_sampler.sampler_step(sampler, optimiser, precision, ids, StepRandom("x", number), parts=2)

    return sampler, step


@pytest.mark.parametrize("operation", ["nonzero", "unique", "bool", "item", "cpu_mask", "tensor", "masked_select"])
def test_the_mode_refuses_what_waits(operation):
    x = torch.arange(3)
    waits = dict(
        nonzero=lambda: x.nonzero(),
        unique=lambda: x.unique(),
        bool=lambda: bool(x.any()),
        item=lambda: x[0].item(),
        cpu_mask=lambda: x[x > 1],
        tensor=lambda: x + torch.tensor(1),
        masked_select=lambda: x.masked_select(x > 1),
    )
    with NoWait(), pytest.raises(AssertionError):
        waits[operation]()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_stage_1_never_waits(quantizer, monkeypatch):
    training = stage_1(monkeypatch, quantizer)
    meters = Meters(CPU)
    for step in (1, 2):
        x = torch.rand(4, 3, 32, 32)
        with NoWait():
            meters.add(training.update(x, step, StepRandom("x", step)))
    assert {"d_loss", "g_loss", "lecam", "perceptual"} <= meters.pop_means().keys()


def test_cudnn_measures_its_kernels_in_training_steps_only(shapes, tmp_path, monkeypatch):
    def recorded(function):
        def record(*args):
            cudnn = torch.backends.cudnn
            seen.append((function.__name__, cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32))
            return function(*args)

        return record

    seen, rest = [], (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_vqgan.Training, "update", recorded(train_vqgan.Training.update))
    monkeypatch.setattr(train_vqgan, "validate", recorded(train_vqgan.validate))
    train_stage_1(shapes, "x", "--train_steps 1 --steps_per_eval 1")
    assert seen == [("update", True, True, *rest), ("validate", True, False, *rest)]


def test_stage_1_never_waits_with_a_loss_scale(monkeypatch):
    training = stage_1(monkeypatch, "nearest", "--amp --amp_dtype fp16 --img_size 16 --accumulate_steps 2")
    training.vqgan.perceptual = None
    with NoWait():
        training.update(torch.rand(4, 3, 16, 16), 1, StepRandom("x", 1))


@pytest.mark.parametrize("amp", ["", "bf16", "fp16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stage_2_never_waits(sampler, amp):
    _, step = stage_2(sampler, Precision(bool(amp), amp, CPU))
    with NoWait():
        out = step(1)
    assert out.loss.isfinite()


@pytest.mark.parametrize("loss_type", ["elbo", "reweighted_elbo", "mlm"])
def test_fixed_shapes_give_the_same_loss_and_gradients(loss_type):
    model, ids = tiny(loss_type=loss_type), torch.randint(0, 3, (6, 4))
    results = []
    for model.fixed_shapes in (False, True):
        out = model.loss(ids, StepRandom("x", 1))
        gradients = torch.autograd.grad(out.loss, model.parameters(), allow_unused=True)
        results.append([out.bits, *(g for g in gradients if g is not None)])
    assert len(results[0]) > 20
    for usual, fixed in zip(*results, strict=True):
        assert_close(fixed, usual, 1e-5)


@pytest.fixture
def compiled_once(monkeypatch):
    """Compiling fails at a graph break. Returns a context in which compiling again fails, too."""
    torch._dynamo.reset()
    logging.getLogger("torch.__trace").propagate = False  # pytest would show all it says
    monkeypatch.setattr(compilation, "OPTIONS", dict(backend="eager", fullgraph=True))
    yield lambda: torch.compiler.set_stance("fail_on_recompile")
    torch._dynamo.reset()


@pytest.mark.parametrize("more", ["", "--amp --amp_dtype bf16 --accumulate_steps 2"])
def test_stage_1_is_compiled_once(more, monkeypatch, compiled_once):
    training = stage_1(monkeypatch, "nearest", f"--img_size 16 {more}")
    training.vqgan.perceptual = None
    compilation.compile_parts("on", training.vqgan.parts_to_compile())
    for step in range(1, 51):
        with compiled_once() if step > 1 else contextlib.nullcontext():
            training.update(torch.rand(4, 3, 16, 16), step, StepRandom("x", step))


@pytest.mark.parametrize("network", ["vgg", "efficientnet_lite0"])
def test_perceptual_distances_are_compiled_once(network, compiled_once):
    with torch.device("meta"):
        distance = vgg_distance("meta") if network == "vgg" else PerceptualDistance(EfficientNetLite0())
        compilation.compile_parts("on", [distance])
        for step in range(2):
            with compiled_once() if step > 0 else contextlib.nullcontext():
                assert distance(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)).shape[0] == 2


@pytest.mark.parametrize("amp", ["", "bf16"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_stage_2_and_sampling_are_compiled_once(name, amp, compiled_once):
    precision = Precision(bool(amp), amp, CPU)
    sampler, step = stage_2(name, precision)
    compilation.compile_parts("on", sampler.parts_to_compile())

    def sample(seed):
        draws = [sample_uniforms(seed, range(n), sampler.draws_per_sample()) for n in (20, 5)]
        sampler.eval()
        with precision.autocast():
            list(sampler.sample_many(lambda rows: draws[0][rows.start : rows.stop], 20, 5))
            return sampler.sample(draws[1])

    for number in range(50):
        with compiled_once() if number > 0 else contextlib.nullcontext():
            step(number)
            if number % 10 == 0:
                sample(number)


def test_a_full_batch_to_the_end_draws_the_same_samples():
    model = tiny()
    draws = sample_uniforms(0, range(7), model.draws_per_sample())
    results = []
    for model.fixed_shapes in (False, True):
        results.append(torch.cat(list(model.sample_many(lambda rows: draws[rows.start : rows.stop], 7, 3))))
    assert torch.equal(*results)


class CudaRandom:
    """Like StepRandom. (A generator cannot be on a fake device.)"""

    def rand(self, *shape):
        return torch.rand(*shape, device="cuda")


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device of fake tensors: an operation on tensors of two devices raises an error."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a real device
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda", 0):
        yield torch.device("cuda", 0)


def on_cuda(*tensors):
    return all(isinstance(t, FakeTensor) and t.device.type == "cuda" for t in tensors)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_stage_1_stays_on_the_device(quantizer, cuda):
    H = get_hparams("vqgan", "", vqgan_flags("unused", "x", f"--quantizer {quantizer}"))
    model = build_vqgan(H, vgg_distance(cuda))
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        x_hat, quantized = model.ae(x, step=1, rng=CudaRandom())
        losses = train_vqgan.reconstruction_nll(x, x_hat, model.perceptual, 1.0)
        real, fake = (model.disc(diff_augment(images, CudaRandom())).float() for images in (x, x_hat))
        hinge, lecam = hinge_discriminator_loss(real, fake), LeCam()(real, fake)
        ids = model.ae.encode(x)
        decoded = model.ae.decode(ids, *quantized.ids.shape[1:])
    assert on_cuda(x_hat, *losses, hinge, lecam, quantized.loss, quantized.mean_distance, ids, decoded)


class Layouts(TorchDispatchMode):
    """Refuses convolutions and norms of images that are not channels last. They would copy the images."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.convolution.default, aten.native_group_norm.default, aten.native_batch_norm.default):
            assert args[0].is_contiguous(memory_format=torch.channels_last), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_stage_1_keeps_channels_last(quantizer, cuda):
    H = get_hparams("vqgan", "", vqgan_flags("unused", "x", f"--quantizer {quantizer}"))
    model, layout = build_vqgan(H, vgg_distance(cuda)), train_vqgan.memory_format(cuda)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # the method `to` does not work with fake tensors
            module.weight = torch.nn.Parameter(module.weight.detach().contiguous(memory_format=layout))
    x = torch.rand(4, 3, 16, 16).contiguous(memory_format=layout)
    with Layouts(), torch.no_grad():
        x_hat, _ = model.ae(x, step=1, rng=CudaRandom())
        train_vqgan.reconstruction_nll(x, x_hat, model.perceptual, 1.0)
        model.disc(diff_augment(x_hat, CudaRandom()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_stage_2_stays_on_the_device(name, cuda):
    sampler = tiny(name)
    sampler.fixed_shapes = True
    with torch.no_grad():
        out = sampler.loss(torch.zeros(4, 4, dtype=torch.int64), CudaRandom())
        sampler.record(out.extra)
    assert on_cuda(out.loss, out.bits, *out.extra.values())


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_stays_on_the_device(name, cuda):
    sampler, uniforms = tiny(name), torch.rand(2, 3, 3)
    canvas = sample_canvas(sampler, uniforms, (2, 2), top_k=2, top_p=0.9, temp_end=0.5)
    assert on_cuda(canvas) and canvas.shape == (2, 3, 3)
    if name == "autoregressive":
        assert on_cuda(sampler.sample(torch.rand(3, 4)))
