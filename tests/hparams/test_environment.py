"""A script that is started with a Python without PyTorch: one line that says how to start one that has it."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

MODELS = "--sampler absorbing --ae_load_dir ae --ae_load_step 1"
CALLS = {
    "train_vqgan.py": "--dataset demo",
    "train_sampler.py": f"--dataset demo {MODELS}",
    "experiments/benchmark.py": "",
    "experiments/calc_FID.py": f"--dataset demo --n_samples 5 {MODELS}",
    "experiments/calc_PRDC.py": f"--dataset demo --n_samples 5 {MODELS}",
    "experiments/calc_VQGAN_FID.py": "--dataset demo --ae_load_dir ae --ae_load_step 1",
    "experiments/calc_approximate_ELBO.py": f"--dataset demo {MODELS}",
    "experiments/calc_nearest_neighbours.py": f"--dataset demo {MODELS}",
    "experiments/compare_inpainting.py": f"--dataset demo {MODELS}",
    "experiments/compare_quantizers.py": "--dataset demo",
    "experiments/dashboard.py": "",
    "experiments/demo.py": "",
    "experiments/draw_examples.py": "houses --target x",
    "experiments/draw_openmoji.py": "",
    "experiments/edit_images.py": f"--dataset demo --numbers 0 --keep left {MODELS}",
    "experiments/export.py": "--load_dir ae --target x",
    "experiments/generate_big_samples.py": f"--dataset demo --shape 8 8 {MODELS}",
    "experiments/get_samples.py": f"--dataset demo {MODELS}",
    "experiments/get_weights.py": "vgg",
    "experiments/judge_images.py": f"--dataset demo {MODELS}",
    "experiments/scaling.py": "",
    "experiments/show_run.py": "--log_dir ae",
    "experiments/sweep_sampling.py": f"--dataset demo {MODELS}",
}


def call(root, script, words, cwd):
    """Run a script of the checkout `root` in a Python without installed packages -> (exit code, lines on stderr)."""
    command = [sys.executable, "-S", str(root / script), *words.split()]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.splitlines()


def test_every_script_is_tried():
    here = {p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")]}
    assert here - {"experiments/__init__.py"} == set(CALLS)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the code, without an environment."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("hparams", "utils", "models", "experiments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("train_vqgan.py", "train_sampler.py", "datasets.yaml"):
        shutil.copy(ROOT / part, folder)
    (folder / "logs" / "ae").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("script", CALLS)
def test_a_python_without_packages_is_refused_in_one_line(script, checkout):
    code, (line,) = call(checkout, script, CALLS[script], checkout)
    assert code == 2
    assert line.startswith(f"error: this Python ({sys.executable}, ") and " has no " in line
    assert "run `make .venv/.ready`" in line and "`source .venv/bin/activate`" in line


def test_the_environment_beside_the_script_is_named(checkout, tmp_path):
    packages = checkout / ".venv" / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    code, (line,) = call(checkout, "train_vqgan.py", "--dataset demo", checkout)
    assert code == 2 and "`make .venv/.ready`" in line, "one that lacks PyTorch, too, is of no use"
    (packages / "torch").mkdir()
    for cwd, place in ((checkout, ".venv"), (tmp_path, checkout / ".venv")):
        code, (line,) = call(checkout, "train_vqgan.py", "--dataset demo", cwd)
        assert code == 2
        assert line.endswith(f"has no PyTorch: run `source {place}/bin/activate`, then the same command with `python`")


@pytest.mark.parametrize(
    "script",
    sorted(set(CALLS) - {"experiments/demo.py", "experiments/draw_examples.py", "experiments/draw_openmoji.py"}),
)
def test_help_needs_no_packages(script, checkout):
    assert call(checkout, script, "--help", checkout) == (0, [])


def test_mistakes_are_answered_first(checkout):
    code, (line,) = call(checkout, "train_vqgan.py", "--datset demo", checkout)
    assert code == 2 and "did you mean --dataset?" in line
