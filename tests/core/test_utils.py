"""Seeds, averages, meters, precision, signals, the rounding of images, messages."""

import io
import itertools
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.utils import make_grid, save_image

from utils.core import distributed, progress
from utils.core.seed import StepRandom, derive_seed, permutation, sample_uniforms, seed_everything
from utils.core.signals import StopRequest
from utils.data.pixels import to_uint8
from utils.display.images import sheet, triples
from utils.training.amp import Precision, resolve_dtype
from utils.training.ema import EMA
from utils.training.meters import CodeUsage, Meters

# ---------------------------------------------------------------------- seeds


def test_different_words_have_different_seeds():
    words = [("a",), ("b",), ("a", "b"), ("ab",), ("b", "a"), ("a", 1), ("a", 11), ("a", 1, 1), (1, "a"), ("",)]
    words += [("step", seed, step) for seed in range(20) for step in range(50)]
    seeds = [derive_seed(*w) for w in words]
    assert len(set(seeds)) == len(words) and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed("step", 0, 1) == 4586561882217313810, "seeds are part of what a resumed run must find again"


def test_seed_everything_reaches_torch_and_numpy():
    def draw(*words):
        seed_everything(*words)
        return torch.rand(3).tolist(), np.random.rand(3).tolist()

    assert draw("init", 0) == draw("init", 0)
    assert all(a != b for a, b in zip(draw("init", 0), draw("init", 1), strict=True))


def test_permutations_are_of_seed_and_epoch():
    orders = {(s, e): tuple(permutation(s, e, 50)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9 and all(sorted(o) == list(range(50)) for o in orders.values())
    assert tuple(permutation(1, 2, 50)) == orders[1, 2]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_draw_the_rows_of_one_process(world):
    n = 8 // world

    def draws(rows, **given):
        random = StepRandom("vqgan", 3, 7, **given)
        return [random.rand(rows), random.rand(rows, 2, 3), random.rand(rows)]

    alone = draws(8)
    ranks = [draws(n, rank=r, world_size=world) for r in range(world)]
    for i, expected in enumerate(alone):
        assert torch.equal(torch.cat([r[i] for r in ranks]), expected)
    assert not torch.equal(alone[0], alone[2]), "each call draws anew"
    assert not torch.equal(StepRandom("vqgan", 3, 8).rand(8), alone[0])


def test_uniforms_of_a_sample_do_not_depend_on_its_batch():
    everything = sample_uniforms(5, range(12), (4, 3))
    assert everything.shape == (12, 4, 3) and everything.unique().numel() == 144
    assert torch.equal(torch.cat([sample_uniforms(5, range(i, i + 3), (4, 3)) for i in (0, 3, 6, 9)]), everything)
    assert torch.equal(sample_uniforms(5, torch.tensor([7, 2]), (4, 3)), everything[[7, 2]])
    assert not torch.equal(sample_uniforms(6, range(12), (4, 3)), everything)
    u = sample_uniforms(0, range(200), (50,))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.01


# ---------------------------------------------------------------------- averages


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.995])
def test_ema_is_the_closed_form(beta, warmup):
    source = torch.nn.Linear(3, 2)
    ema = EMA(source, beta, warmup=warmup)
    start = source.weight.detach().clone()
    seen = []
    for _ in range(20):
        with torch.no_grad():
            source.weight += torch.randn(2, 3)
        seen.append(source.weight.detach().clone())
        ema.update(len(seen))
    decays = [min(beta, (1 + n) / (10 + n)) if warmup else beta for n in range(1, len(seen) + 1)]
    later = [math.prod(decays[i + 1 :]) for i in range(len(seen))]
    expected = math.prod(decays) * start + sum(w * (1 - d) * p for w, d, p in zip(later, decays, seen, strict=True))
    assert torch.allclose(ema.model.weight, expected, atol=1e-5)
    assert torch.equal(ema.model.bias, source.bias)


def test_the_warm_up_of_the_average_ends():
    """The first update keeps 2/11 of the start; at the paper's 0.995 all is as without it from update 1790 on."""
    ema, plain = (EMA(torch.nn.Linear(1, 1), 0.995, warmup=warmup) for warmup in (True, False))
    assert ema.decay(1) == 2 / 11 and ema.decay(1789) < 0.995
    assert all(ema.decay(n) == plain.decay(n) == 0.995 for n in (1790, 1791, 10**6))


def test_ema_averages_parameters_only_and_shares_what_never_trains():
    fixed = torch.nn.Linear(2, 2)
    source = torch.nn.ModuleDict(dict(norm=torch.nn.BatchNorm2d(2), fixed=fixed))
    ema = EMA(source, 0.5, shared=(fixed, None))
    assert ema.model["fixed"] is fixed and len(ema.pairs) == 2
    source["norm"](torch.randn(4, 2, 3, 3) + 5)
    with torch.no_grad():
        source["norm"].weight += 1
    ema.update(1)
    assert torch.equal(ema.model["norm"].weight, torch.full((2,), 1.5))
    assert torch.equal(ema.model["norm"].running_mean, torch.zeros(2))
    assert not ema.model["norm"].training and not ema.model["norm"].weight.requires_grad
    assert source["norm"].training and source["norm"].weight.requires_grad and fixed.weight.requires_grad is False
    again = EMA(source, 0.5)
    again.load_state_dict(ema.state_dict())
    assert torch.equal(again.model["norm"].weight, ema.model["norm"].weight)


# ---------------------------------------------------------------------- meters


def test_meters_weight_with_counts():
    meters = Meters("cpu")
    assert meters.pop_means() == {}
    meters.add(dict(loss=torch.tensor(2.0, requires_grad=True), lr=0.5), count=3)
    meters.add(dict(loss=6.0), count=1)
    assert meters.pop_means() == dict(loss=3.0, lr=0.5)
    assert meters.pop_means() == {}
    meters.add(dict(loss=torch.tensor(math.nan)))
    assert math.isnan(meters.pop_means()["loss"])


def test_meters_keep_their_digits():
    meters = Meters(torch.device("cpu"))
    for _ in range(30_000):
        meters.add(dict(x=0.1), count=1000)
    assert abs(meters.pop_means()["x"] - 0.1) < 1e-9


def test_meters_go_on_exactly_where_they_were_saved():
    values = torch.rand(20).tolist()
    whole, first, second = Meters("cpu"), Meters("cpu"), Meters("cpu")
    for i, v in enumerate(values):
        whole.add(dict(loss=v), i + 1)
        (first if i < 9 else second).add(dict(loss=v), i + 1)
        if i == 8:
            second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert second.pop_means() == whole.pop_means()
    narrow = {k: v.float() for k, v in first.state_dict().items()}  # as written before sums were float64
    second.load_state_dict(narrow)
    second.add(dict(loss=1.0))
    assert second.sums["loss"].dtype == torch.float64


def test_code_usage():
    usage = CodeUsage(6, "cpu")
    usage.add(torch.tensor([[0, 5], [5, 5]]))
    usage.add(torch.tensor([1], dtype=torch.int16))
    saved = {k: v.clone() for k, v in usage.state_dict().items()}
    assert usage.pop_counts().tolist() == [1, 1, 0, 0, 0, 3]
    assert usage.pop_counts().tolist() == [0] * 6
    usage.load_state_dict(saved)
    usage.add(torch.tensor([2]))
    assert usage.pop_counts().tolist() == [1, 1, 1, 0, 0, 3]


def test_one_process_is_not_a_special_case():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2)
    assert distributed.all_reduce_sum(x) is x and distributed.all_gather_rows(x) is x
    assert distributed.all_reduce_max(15) == 15


@pytest.mark.parametrize("n", [1, 4, 7, 12])
def test_turns_share_everything_out_in_order(monkeypatch, n):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(distributed.turns(5, n, 2)))
    taken = [own for turn in itertools.zip_longest(*shares) for own, _ in filter(None, turn)]
    assert [i for own in taken for i in own] == list(range(5, 5 + n))
    assert sum(together for _, together in shares[0]) == n and max(map(len, taken)) == min(2, -(-n // 3))


# ---------------------------------------------------------------------- precision


def trained(precision, gradients):
    """A parameter after updates (SGD, rate 1) whose losses have these gradients, and its course."""
    p = torch.nn.Parameter(torch.zeros(()))
    optimiser = torch.optim.SGD([p], lr=1.0)
    course = []
    for g in gradients:
        optimiser.zero_grad()
        precision.scale(p * g).backward()
        precision.step(optimiser)
        precision.update()
        course.append(p.item())
    return course


def test_fp16_skips_and_counts_updates_that_overflow():
    precision = Precision(True, "fp16", torch.device("cpu"))
    assert precision.scaling and precision.describe() == "fp16"
    before = precision.scaler.get_scale()
    assert trained(precision, [1.0, math.inf, 1.0, math.nan, 1.0]) == [-1, -1, -2, -2, -3]
    assert precision.skipped == 2 and precision.scaler.get_scale() == before / 4
    assert precision.unscaled(precision.scale(torch.tensor(3.0))) == 3

    resumed = Precision(True, "fp16", torch.device("cpu"))
    resumed.load_state_dict(precision.state_dict())
    assert resumed.skipped == 2 and resumed.scaler.get_scale() == before / 4
    full = Precision(False, "auto", torch.device("cpu"))
    full.load_state_dict(precision.state_dict())  # resumed in float32: nothing to scale
    assert full.scale(torch.tensor(3.0)) == 3


def test_each_optimiser_is_counted():
    precision = Precision(True, "fp16", torch.device("cpu"))
    parameters = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimisers = [torch.optim.SGD([p], lr=1.0) for p in parameters]
    for p, optimiser, g in zip(parameters, optimisers, (1.0, math.inf), strict=True):
        precision.scale(p * g).backward()
        precision.step(optimiser)
    precision.update()
    assert [p.item() for p in parameters] == [-1, 0] and precision.skipped == 1


@pytest.mark.parametrize(
    ("enabled", "amp_dtype", "dtype"),
    [
        (True, "bf16", torch.bfloat16),
        (True, "auto", torch.bfloat16),
        (True, "fp16", torch.float16),
        (False, "bf16", torch.float32),
        (False, "auto", torch.float32),
    ],
)
def test_autocast_types(enabled, amp_dtype, dtype):
    precision = Precision(enabled, amp_dtype, torch.device("cpu"))
    with precision.autocast():
        y = torch.nn.Linear(2, 2)(torch.ones(1, 2))
    assert y.dtype == dtype == precision.dtype
    assert precision.scaling == (dtype == torch.float16)
    if not precision.scaling:
        x = torch.tensor(3.0)
        assert precision.scale(x) is x and precision.unscaled(x) is x
        assert trained(precision, [1.0, 2.0]) == [-1, -3] and precision.skipped == 0
    assert resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16


# ---------------------------------------------------------------------- images


def test_to_uint8_rounds_as_save_image_does():
    x = torch.cat((torch.linspace(-0.1, 1.1, 40_000), torch.arange(256) / 255, (torch.arange(255) + 0.5) / 255))
    x = x[: len(x) // 3 * 3].view(3, 1, -1)
    file = io.BytesIO()
    save_image(x, file, format="png", padding=0)
    file.seek(0)
    written = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(to_uint8(x), written)


def test_to_uint8_gives_bytes_back():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(bytes_.float() / 255), bytes_)
    assert to_uint8(torch.tensor([-math.inf, math.inf, 0.5])).tolist() == [0, 255, 128]
    assert to_uint8(torch.tensor([1.0, 0.5], dtype=torch.bfloat16)).tolist() == [255, 128]


def test_sheets():
    x = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    picture = sheet(x, 3, padding=1)
    assert picture.shape == (3, 11, 16) and picture.dtype == torch.uint8
    assert picture[0, 1::5, 1::5][:, :3].tolist() == [[0, 1, 2], [3, 4, 255]]
    for n, columns in ((5, 3), (5, None), (4, 2), (3, 8)):
        expected = make_grid(x[:n], nrow=columns or 3, padding=2, pad_value=255)
        assert torch.equal(sheet(x[:n], columns), expected)
    assert sheet(x[:1]).shape == (3, 8, 8) and sheet(x[:, :1], 5, padding=0).shape == (1, 4, 20)
    both = sheet(triples(x, x + 10), 6, padding=0, group=3, gap=4)
    assert both[0, ::4, ::4].tolist() == [
        [0, 10, 40, 255, 1, 11, 40],
        [2, 12, 40, 255, 3, 13, 40],
        [4, 14, 40, 255, 255, 255, 255],
    ]
    assert triples(x[:1] + 100, x[:1])[2].unique().tolist() == [255]  # four times 100, as much as there is room for


# ---------------------------------------------------------------------- closed output


@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("lambda: print(1, flush=True)", 141),  # a script that only prints ends, as other programs do
        ("lambda: print(1)", 141),
        ("lambda: (say(1), say(2), print(3), print('done', file=sys.stderr))", 0),  # the work continues
    ],
)
def test_a_script_whose_output_is_closed_is_quiet(main, code):
    program = f"""
import sys
from utils.core.errors import run_main
from utils.core.progress import say
sys.stdin.read()
run_main({main})
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read().decode() == ("" if code else "done\n")
    assert process.wait(timeout=60) == code


def test_another_broken_pipe_is_an_error():
    program = """
import os
from utils.core.errors import run_main
def main():
    reading, writing = os.pipe()
    os.close(reading)
    os.write(writing, b"x")
run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: Broken pipe\n")


def test_a_script_without_stdout_says_nothing():
    program = """
import os, sys
from utils.core.errors import run_main
from utils.core.progress import say
run_main(lambda: say("a line"))
os._exit(7)
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", StopRequest.SIGNALS)
def test_the_first_signal_asks_to_stop(name, capfd):
    number = getattr(signal, name)
    before = [signal.getsignal(getattr(signal, n)) for n in StopRequest.SIGNALS]
    with StopRequest() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.number == number and stop.exit_code == 128 + number
    assert [signal.getsignal(getattr(signal, n)) for n in StopRequest.SIGNALS] == before
    assert "stopping after this step" in capfd.readouterr().err


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGINT")])
def test_the_second_signal_ends_at_once(first, second):
    """Even with a terminal that is gone: file descriptor 2 is closed."""
    program = f"""
import os, signal
from utils.core.signals import StopRequest
os.close(2)
with StopRequest() as stop:
    os.kill(os.getpid(), signal.{first})
    print(stop.number, flush=True)
    os.kill(os.getpid(), signal.{second})
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{getattr(signal, first).value}\n"
    assert done.returncode == 128 + getattr(signal, second)


# ---------------------------------------------------------------------- messages


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    progress.say("caf\u00e9 \udcff.png")
    sys.stdout.flush()
    assert file.getvalue() == b"caf\\xe9 \\udcff.png\n"


def test_progress_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    with progress.Progress(4, "encoding", "img", initial=1) as bar:
        bar.update(1, dict(loss=0.123456, epoch=2))
        bar.update(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("encoding: 2/4 (50%), ") and lines[0].endswith("left loss 0.1235, epoch 2")
    assert lines[1].startswith("encoding: 4/4 (100%), ") and lines[1].endswith("loss 0.1235, epoch 2")
    with progress.Progress(8, "sampling", "img") as bar:
        for step in bar.within(4)(["a", "b"]):
            assert (step, bar.begun) in (("a", 0), ("b", 2))
        bar.update(4)
        assert (bar.done, bar.begun) == (4, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["1/2", "2/2", "2/2", "2/2"]
    assert [line.split(",")[0] for line in lines] == [  # within a batch, the count continues, as the time left does
        "sampling: 0/8 (0%) step 1/2",
        "sampling: 2/8 (25%)",
        "sampling: 4/8 (50%)",
        "sampling: 4/8 (50%)",
    ]
    assert list(progress.track([1, 2], "two")) == [1, 2]
