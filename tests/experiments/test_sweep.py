"""The sweep over the settings of sampling: its distance, its kept cells, what it recommends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import experiment, prior_flags
from test_metrics import SmallExtractor, call, place  # noqa: F401 (a fixture)

from experiments import calc_FID, get_samples, sweep_sampling
from utils.display.commands import draw_samples
from utils.evaluation.kernel import KernelDistance

SMALL = "--n_samples 10 --seeds 2 --passes 2 4 --temps 0.8 1 --orders random confidence --schedules arccos uniform"
FEW = "--n_samples 10 --seeds 1 --passes 2 --temps 1 --orders random halton raster confidence --schedules arccos"


def without_steps(words):
    at = words.index("--sample_steps")
    return words[:at] + words[at + 2 :]


def flags(shapes, more=""):
    return without_steps(prior_flags(shapes, "sweep", f"{SMALL} {more}"))


def kept(folder="."):
    """The lines of cells.jsonl."""
    path = Path(folder, "logs/sweep/cells.jsonl")
    return path.read_text().splitlines() if path.exists() else []


def test_the_kernel_distance_is_that_of_torch_fidelity():
    from torch_fidelity.metric_kid import kernel_poly, mmd2

    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 9, generator=random), 0.3 + torch.randn(50, 9, generator=random)
    kernel = dict(kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    a, b = x.double().numpy(), y.double().numpy()
    expected = mmd2(*(kernel_poly(*pair, **kernel) for pair in ((a, a), (a, b), (b, b))))
    assert KernelDistance(x)(y) == pytest.approx(expected, rel=1e-9)
    # Unbiased also for sides of different sizes: its mean over many small samples of the same law is 0.
    found = [
        KernelDistance(torch.randn(20, 3, generator=random))(torch.randn(7, 3, generator=random)) for _ in range(600)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))


def test_a_sweep(place, shapes, capsys):  # noqa: F811
    row = call(sweep_sampling, flags(shapes))
    assert row["metric"] == "sweep_sampling" and len({tuple(r["cell"].values()) for r in row["cells"]}) == 16
    kernels = [r["values"]["kernel"] for r in row["cells"]]
    assert row["values"]["kernel"] == min(kernels) and row["cell"] == row["cells"][kernels.index(min(kernels))]["cell"]
    for r in row["cells"]:
        exact = not (r["cell"]["sample_order"] == "random" and r["cell"]["sample_schedule"] == "uniform")
        assert r["values"]["passes"] == r["cell"]["sample_steps"] if exact else r["values"]["passes"] <= 4
        assert r["values"]["kernel_se"] > 0 and r["values"]["seconds"] > 0
    out = capsys.readouterr().out
    assert out.count("experiments/get_samples.py") == 3  # for 2 steps, for 4, and of all
    # The command that is recommended is understood.
    line = next(line for line in out.splitlines() if "get_samples.py" in line)
    words = line.split("get_samples.py ")[1].split()
    H = experiment(get_samples, [*words, "--dry_run"])
    assert H.sample_steps == 2 and H.log_dir == "prior_2_steps"
    (cell,) = [r["cell"] for r in row["cells"] if f"2 steps: {sweep_sampling.described(r['cell'])}:" in out]
    assert all(getattr(H, name) == value for name, value in cell.items())
    text = Path("logs/sweep/sweep.md").read_text()
    assert text.count("steps, ") >= 17 and "| reconstructions |" in text
    lines = kept()
    assert len(lines) in (32 + 2, 32 + 4)
    for cell in (r["cell"] for r in row["cells"]):  # the mean and the standard error of two seeds
        a, b = (r["values"]["kernel"] for r in map(json.loads, lines[:32]) if r["cell"] == cell)
        values = next(r["values"] for r in row["cells"] if r["cell"] == cell)
        assert values["kernel"] == pytest.approx((a + b) / 2) and values["kernel_se"] == pytest.approx(abs(a - b) / 2)
    # Again: nothing is computed, other lines are ignored; more values add cells.
    lines += ['{"key": [1], "values": 3}', '{"key": "a", "values": {}}', "[1]"]
    Path("logs/sweep/cells.jsonl").write_text("\n".join(lines) + "\n")
    SmallExtractor.seen = 0
    again = call(sweep_sampling, flags(shapes))
    assert SmallExtractor.seen == 0 and again["values"] == row["values"] and kept() == lines
    call(sweep_sampling, flags(shapes, "--remask 0 0.5 --passes 4 --temps 0.8"))
    assert SmallExtractor.seen in range(10 * 2 * 4, 10 * 2 * 4 + 41)


def test_a_cell_is_what_calc_fid_measures(place, shapes):  # noqa: F811
    one = "--n_samples 10 --seeds 1 --passes 3 --temps 0.9 --orders halton --schedules cosine"
    row = call(sweep_sampling, without_steps(prior_flags(shapes, "sweep", one)))
    given = "--n_samples 10 --sample_steps 3 --temp 0.9 --sample_order halton --sample_schedule cosine"
    fid = call(calc_FID, prior_flags(shapes, "fid", given))
    assert row["values"]["frechet"] == pytest.approx(fid["values"]["fid"], rel=1e-6)


def test_the_printed_command_draws_from_the_measured_weights(place, shapes):  # noqa: F811
    line = draw_samples(experiment(sweep_sampling, flags(shapes, "--weights raw --allow_other_ae")), "x", temp=0.9)
    H = experiment(get_samples, line.split("get_samples.py ")[1].split())
    assert (H.weights, H.allow_other_ae, H.temp) == ("raw", True, 0.9)
    assert "--weights" not in draw_samples(experiment(sweep_sampling, flags(shapes)), "x")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--passes 1 2 3 4 --temps 0.5 0.6 0.7 0.8 0.9", "the grid has 80 cells: give fewer values, or --max_cells 80"),
        ("--temp 0.9", "--temp has several values in a sweep: give --temps"),
        ("--sample_type mlm", "--sample_type has several values in a sweep: give --orders"),
        ("--nearest_k 9", "--nearest_k 9 is too large"),
        ("--n_samples 9", "--n_samples 9 is too small"),
        ("--orders spiral", "--orders"),
        ("--remask 2", "--remask 2.0 is too large"),
        ("--temps 0.8,x", "argument --temps: 'x' is not a number"),
        ("--temps 0", "--temps 0.0 is too small"),
    ],
)
def test_contradictions(trained, shapes, monkeypatch, capsys, more, message):
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit) as stop:
        experiment(sweep_sampling, without_steps(prior_flags(shapes, "x", f"{SMALL} {more}")))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line


def test_a_killed_sweep_continues(trained, shapes, tmp_path):
    (tmp_path / "logs").mkdir()
    for name in ("ae", "prior"):
        (tmp_path / "logs" / name).symlink_to(trained / "logs" / name)
    words = without_steps(prior_flags(shapes, "sweep", f"{FEW} --extractor efficientnet_lite0"))
    command = [sys.executable, str(ROOT / "experiments/sweep_sampling.py"), *words]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(6000):
        if len(kept(tmp_path)) >= 2 or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = kept(tmp_path)
    assert 2 <= len(before) < 4
    damaged = [*before[:1], before[1][:50], *before[2:], before[0][:90]]  # a damaged line is computed again
    (tmp_path / "logs/sweep/cells.jsonl").write_text("\n".join(damaged))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    after = kept(tmp_path)
    assert after[: len(before)] == damaged[:-1]
    new = [json.loads(line) for line in after[len(before) :]]
    measured = {(*row["cell"].values(), row["seed"]) for row in new}
    assert len(measured) == len(new) == 4 + 1 - (len(before) - 1)  # the last one confirms the winner
    finished = {(*row["cell"].values(), row["seed"]) for row in map(json.loads, before)}
    lost = json.loads(before[1])
    assert finished & measured == {(*lost["cell"].values(), lost["seed"])}
