"""--compile: the same numbers as without, the same names in checkpoints, and one line where it cannot work."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from scripts import run, train_stage_1, train_stage_2, vqgan_flags

from models.samplers.base import Sampler
from utils.core.checkpoint import checkpoints_of
from utils.training import compilation

GAN = "--train_steps 3 --steps_per_log 1 --ema --steps_per_update_ema 1 --disc_start_step 0 --diff_aug"


@pytest.fixture
def graphs(monkeypatch):
    """Graphs are captured and differentiated as always, and then run operation by operation: no C++ compiler is
    needed. Returns the list of what was compiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    from torch._dynamo.backends.debugging import aot_eager

    torch._dynamo.reset()
    logging.getLogger("torch.__trace").propagate = False  # pytest would show all it says
    monkeypatch.setattr(compilation, "OPTIONS", dict(backend=backend))
    yield compiled
    torch._dynamo.reset()


def same(one, other, names):
    """The curves of two runs to rounding, and the names in their checkpoints of step 3. (Not the weights: some have
    no gradient but rounding's, which Adam makes as large as any.)"""
    texts = (Path("logs", run, "stats.jsonl").read_text() for run in (one, other))
    rows, others = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert len(rows) >= 3 and [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other_row in zip(rows, others, strict=True):
        assert row == pytest.approx(other_row, rel=1e-3, abs=1e-6)
    for name in names:
        states = (checkpoints_of(run).load(name, 3) for run in (one, other))
        assert len({tuple((k, v.shape) for k, v in state.items()) for state in states}) == 1


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
def test_stage_1(quantizer, shapes, tmp_path, monkeypatch, graphs):
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "plain", f"{GAN} --quantizer {quantizer} --compile off")
    assert not graphs
    train_stage_1(shapes, "compiled", f"{GAN} --quantizer {quantizer} --compile on")
    assert len(graphs) >= 3  # encoder, generator, discriminator
    same("plain", "compiled", ["vqgan", "vqgan_ema"])


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_stage_2(sampler, trained, shapes, tmp_path, monkeypatch, graphs):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "logs" / "ae", tmp_path / "logs" / "ae")
    steps = "--train_steps 3 --steps_per_log 1 --steps_per_display_output 2"  # draws samples with the compiled blocks
    train_stage_2(shapes, "plain", "ae", 4, f"{steps} --compile off", sampler=sampler)
    assert not graphs
    train_stage_2(shapes, "compiled", "ae", 4, f"{steps} --compile on", sampler=sampler)
    assert graphs
    same("plain", "compiled", [sampler])


def test_what_auto_means():
    cpu = torch.device("cpu")
    assert not compilation.pays("auto", cpu) and compilation.pays("on", cpu, much=False)
    assert not compilation.pays("off", cpu)


def test_auto_falls_back(monkeypatch, graphs):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compilation, "OPTIONS", dict(backend=broken))
    net = torch.nn.Linear(2, 2)
    compilation.compile_parts("auto", [net])
    assert net(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.slow
def test_without_a_compiler(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/no-compiler")
    text = run("train_vqgan.py", vqgan_flags(shapes, "x", "--train_steps 1 --compile on"), tmp_path, code=1)
    assert "error: torch.compile does not work here" in text and "--compile off" in text


@pytest.mark.slow
def test_with_the_real_compiler(shapes, tmp_path, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    monkeypatch.chdir(tmp_path)
    train_stage_1(shapes, "plain", f"{GAN} --compile off")
    train_stage_1(shapes, "compiled", f"{GAN} --compile on")
    same("plain", "compiled", ["vqgan"])


def test_only_blocks_of_transformers_are_compiled(trained):
    from test_samplers import tiny

    assert len(tiny().parts_to_compile()) == 2 and isinstance(tiny(), Sampler)
