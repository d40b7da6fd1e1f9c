"""The scripts as a user meets them: help, mistakes, dry runs, in a folder of their own."""

import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_SAMPLER, TINY_VQGAN

from hparams import config
from utils.core.errors import DamagedFile, UsageError, UserError, run_main

EXPERIMENTS = sorted(p for p in (ROOT / "experiments").glob("*.py") if "COMMAND_LINE = " in p.read_text())
SCRIPTS = ["train_vqgan.py", "train_sampler.py", *(f"experiments/{p.name}" for p in EXPERIMENTS)]
REQUIRED = {  # flags of a script's own
    "experiments/calc_FID.py": "--n_samples 5",
    "experiments/calc_PRDC.py": "--n_samples 5",
    "experiments/edit_images.py": "--numbers 0 --keep left",
    "experiments/generate_big_samples.py": "--shape 16 16",
}
AE = "--sampler absorbing --ae_load_dir ae --ae_load_step 15"


@pytest.fixture
def workplace(tmp_path):
    shutil.copy(ROOT / "datasets.yaml", tmp_path)
    return tmp_path


def call(script, words, cwd, python=()):
    """Run a script; returns (exit code, stdout, stderr)."""
    env = dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="100", TORCH_HOME=str(cwd / "torch_home"))
    words = words.split() if isinstance(words, str) else words
    done = subprocess.run(
        [sys.executable, *python, str(ROOT / script), *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def refused(script, words, cwd):
    """The one line on stderr of a call that is refused."""
    code, _, err = call(script, words, cwd)
    assert code == 2, err
    (line,) = err.splitlines()
    return line


# ---------------------------------------------------------------------- answered at once


@pytest.mark.parametrize(
    ("script", "words", "least"),
    [("draw_examples.py", "houses --target x --count -5", 1), ("draw_openmoji.py", "--target x --size 0", 8)],
)
def test_numbers_of_pictures_without_sense_are_refused(script, words, least, tmp_path):
    line = refused(f"experiments/{script}", words, tmp_path)
    assert f"{words.split()[-2]}: {words.split()[-1]} is not possible: give {least} to" in line
    assert not (tmp_path / "x").exists()


def listed(out):
    """The flags that a help lists, in order."""
    return re.findall(r"^  (?:-h, )?--(\w+)", out, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_one_screen_of_common_flags_the_required_ones_first(script, workplace):
    code, out, err = call(script, "--help", workplace)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 64
    family = config.sampler_family() if "--sampler " in out else config.vqgan_family()
    for flag in config.flags_of(family):  # the others by name alone
        assert re.search(rf"\s--{flag.name}\b", out), flag.name
    assert lines[4] == "required:" and "examples:" in lines or "example:" in lines
    required = re.findall(r"--(\w+)", lines[0])
    assert required and listed(out)[: len(required)] == required
    names = listed(out)
    assert {"log_dir", "device", "batch_size", "no_visdom", "help_all"} <= set(names)
    assert ("resume" in names) == (script.startswith("train") or "ELBO" in script)  # what does nothing is not there
    assert not {"ndf", "greedy", "amp_dtype"} & set(names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_all_lists_every_flag_without_waiting_for_torch(script, workplace):
    code, out, err = call(script, "--help_all", workplace, python=("-X", "importtime"))
    assert code == 0
    imported = {line.rsplit("|", 1)[1].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert {"argparse", "hparams"} <= imported
    assert not {"torch", "numpy", "PIL", "yaml"} & imported
    family = config.sampler_family() if "--sampler " in out else config.vqgan_family()
    for flag in config.flags_of(family):
        assert re.search(rf"^  --{flag.name}[ ,\n]", out, re.MULTILINE), flag.name
    if script == "train_vqgan.py":
        assert "--sampler " not in out
    assert "examples:" in out or "example:" in out


def test_the_benchmarks_own_flags(workplace):
    code, out, err = call("experiments/benchmark.py", "--help", workplace, python=("-X", "importtime"))
    assert code == 0 and "--jobs" in out and "example:" in out
    assert "torch" not in {line.rsplit("|", 1)[1].strip() for line in err.splitlines() if "|" in line}
    for words, named in [
        ("--jobs nothing", "nothing"),
        ("--seconds 0", "--seconds 0.0"),
        ("--sise small", "--size?"),
        ("--log_dir ../x", "'../x'"),
    ]:
        assert named in refused("experiments/benchmark.py", words, workplace)


@pytest.mark.parametrize(
    ("script", "words", "named"),
    [
        ("train_vqgan.py", "--dataset churches --batchsize 4", ["unknown flag --batchsize", "--batch_size?"]),
        ("train_vqgan.py", "--datset churches", ["unknown flag --datset", "did you mean --dataset?"]),
        ("train_vqgan.py", "--dataset churches --log-dir x", ["unknown flag --log-dir", "--log_dir?"]),
        ("train_sampler.py", f"{AE} --dataset churches --ema load_dir X", ["'load_dir'", "did you mean --load_dir?"]),
        ("train_sampler.py", "--dataset churches --sampler absorbing ae_load_dir X", ["did you mean --ae_load_dir?"]),
        ("train_vqgan.py", "-dataset churches", ["unknown flag -dataset", "did you mean --dataset?"]),
        ("train_vqgan.py", "\u2014dataset churches", ["did you mean --dataset?"]),
        ("train_vqgan.py", "--dataset churches --epochs 3", ["unknown flag --epochs", "did you mean --train_steps?"]),
        ("train_vqgan.py", "--dataset churches log_dir=x", ["'log_dir=x'", "did you mean --log_dir?"]),
        ("train_vqgan.py", "churches", ["'churches'", "did you mean --dataset churches?"]),
        ("train_vqgan.py", "--dataset Churches", ["--dataset Churches", "did you mean churches?"]),
        ("train_vqgan.py", "--dataset logs", ["--dataset logs", "--dataset custom --custom_dataset_path logs"]),
        ("train_vqgan.py", "--dataset churches --device gpu", ["--device gpu", "did you mean cuda?", "cpu"]),
        (
            "train_sampler.py",
            "--dataset churches --sampler absorbin --ae_load_dir x --ae_load_step 1",
            ["--sampler absorbin", "did you mean absorbing?", "autoregressive"],
        ),
        ("experiments/show_run.py", "some_run", ["'some_run'", "did you mean --log_dir some_run?"]),
        ("experiments/show_run.py", "--log_dir aes", ["--log_dir aes", "did you mean ae?"]),
        ("train_vqgan.py", "--dataset churchs", ["--dataset churchs", "did you mean churches?"]),
        ("train_vqgan.py", "", ["required: --dataset"]),
        ("train_sampler.py", "--dataset churches", ["--ae_load_dir", "--sampler"]),
        ("train_vqgan.py", "--dataset churches --quantizer magic", ["--quantizer", "magic", "gumbel", "nearest"]),
    ],
)
def test_mistakes(script, words, named, workplace):
    (workplace / "logs" / "ae").mkdir(parents=True)
    line = refused(script, words, workplace)
    for part in [f"{script.split('/')[-1]}: error: ", *named]:
        assert part in line


def test_outside_the_repository(tmp_path):
    assert "there is no datasets.yaml beside logs/" in refused("train_vqgan.py", "--dataset churches", tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_while_torch_is_imported(script, workplace):
    (workplace / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (workplace / "logs" / "ae").mkdir(parents=True)
    # Whoever runs the tests may ignore this signal, and its children with it.
    code = (
        "import runpy, signal, sys\n"
        "sys.argv.pop(0)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    family = "--load_dir ae --load_step 1" if "VQGAN" in script else AE
    if script in ("train_vqgan.py", "experiments/compare_quantizers.py"):
        family = ""
    flags = f"--dataset churches {family} {REQUIRED.get(script, '')}".split()
    env = dict(os.environ, PYTHONPATH=f"{workplace}:{ROOT}")
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / script), *flags],
        cwd=workplace,
        env=env,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# ---------------------------------------------------------------------- with torch

# In a process of its own each of these would wait for torch, so that all but one run in this process.


@pytest.fixture
def here(workplace, monkeypatch, capsys):
    """A function that runs a script as __main__ in this process; returns (exit code, stdout, stderr)."""

    def run(script, words):
        monkeypatch.chdir(workplace)
        monkeypatch.setenv("TORCH_HOME", str(workplace / "torch_home"))
        monkeypatch.setattr(sys, "argv", [script, *words])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def failed(result):
    code, _, err = result
    (line,) = err.splitlines()
    assert code == 1
    return line


def test_dry_run_of_stage_1(workplace):
    code, out, err = call("train_vqgan.py", "--dataset churches --batch_size 4 --dry_run", workplace)
    assert (code, err) == (0, "")
    assert "batch_size: 4  (command line)" in out and "latent_shape: 1 16 16  (derived)\n" in out
    assert "ch_mult: 1 1 2 2 4  (derived)\n" in out and "nf: 128\n" in out
    assert re.search(r"VQGAN: [\d,]{9,} parameters; 256 x 256 pixels -> 16 x 16 codes of 1024", out)
    assert re.search(r"GFLOPs an image: encoder [\d.]+, generator [\d.]+, discriminator [\d.]+", out)
    data, weights = out.splitlines()[-2:]
    assert data.startswith("note: the entry 'churches' of datasets.yaml") and "data/lsun" in data
    assert weights.startswith("note: the VGG16 weights for LPIPS are missing: ")
    assert os.listdir(workplace) == ["datasets.yaml"]


def test_dry_run_of_stage_2(workplace, here):
    code, out, err = here("train_sampler.py", f"{AE} --dataset churches --dry_run".split())
    assert (code, err) == (0, "")
    assert "block_size: 256  (derived)\n" in out and "batch_size: 20  (preset churches)\n" in out
    assert "sampler: absorbing  (command line)\n" in out
    assert re.search(r"absorbing: [\d,]{9,} parameters; 256 codes of 1024", out)
    assert re.search(r"one network pass, GFLOPs an image: [\d.]+", out)
    assert "are missing" not in out
    assert os.listdir(workplace) == ["datasets.yaml"]


def test_dry_run_counts_the_images_and_names_the_source_of_each_value(workplace, here, shapes):
    (workplace / "datasets.yaml").write_text(f"mine: {{paths: {shapes}, preset: small, hparams: {{nf: 64}}}}")
    code, out, _ = here("train_vqgan.py", "--dataset mine --batch_size 4 --dry_run".split())
    assert code == 0 and "images of the entry 'mine' of datasets.yaml: 38 train, 2 validate\n" in out
    for line in ("batch_size: 4  (command line)", "nf: 64  (datasets.yaml)", "img_size: 64  (preset small)"):
        assert f"\n{line}\n" in out
    code, out, _ = here("train_vqgan.py", "--dataset mine --steps_per_eval 0 --dry_run".split())
    assert code == 0 and "images of the entry 'mine' of datasets.yaml: 40 train\n" in out


def test_missing_data_folder_names_the_entry(here):
    line = failed(here("train_vqgan.py", ["--dataset", "churches", "--perceptual_weight", "0", "--no_visdom"]))
    assert "'churches' of datasets.yaml" in line and "data/lsun" in line and "'paths'" in line


def test_missing_autoencoder_checkpoint_lists_those_there_are(workplace, here, shapes):
    models = workplace / "logs" / "ae" / "saved_models"
    models.mkdir(parents=True)
    for name in ("vqgan_10.th", "vqgan_ema_10.th", "vqgan_200.th", "ae_optim_30.th"):
        (models / name).write_bytes(b"")
    words = [*TINY_SAMPLER, *AE.split(), "--dataset", "custom", "--custom_dataset_path", str(shapes)]
    line = failed(here("train_sampler.py", words))
    assert "logs/ae/saved_models/vqgan_15.th does not exist" in line and line.endswith("10, 200")


def test_missing_lpips_weights_have_three_remedies(workplace, here, shapes):
    words = [*TINY_VQGAN, "--perceptual_weight", "1", "--dataset", "custom", "--custom_dataset_path", str(shapes)]
    line = failed(here("train_vqgan.py", words))
    assert str(workplace / "torch_home" / "hub" / "checkpoints" / "vgg16-397923af.pth") in line
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in line and "get_weights.py vgg" in line
    assert "--perceptual_weights PATH" in line and "--perceptual_weight 0" in line
    assert "are missing" not in here("train_vqgan.py", ["--dataset", "demo", "--dry_run"])[1], "needs none"


def test_dry_run_names_missing_weights(workplace, here):
    code, out, err = here("experiments/calc_FID.py", f"{AE} --dataset churches --n_samples 5 --dry_run".split())
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert (code, err, len(notes)) == (0, "", 2)
    assert notes[0].startswith("note: the Inception weights are missing: `python experiments/get_weights.py inception`")
    assert str(workplace / "torch_home" / "hub" / "checkpoints") in notes[0]


# ---------------------------------------------------------------------- utils.core.errors


def ends(error, capsys):
    """(exit code, the one line) of a script whose main raises this."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    (line,) = capsys.readouterr().err.splitlines()
    return stop.value.code, line


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (UserError("two\nlines"), 1, "error: two lines"),
        (DamagedFile("x is damaged"), 1, "x is damaged"),
        (UsageError("--x"), 2, "--x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 1, "No such file or directory: a.txt"),
        (OSError(errno.ENOSPC, "No space left on device", "a.th"), 1, "a.th (free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "logs"), 1, "no permission"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 1, "--batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "--batch_size"),
        (MemoryError(), 1, "--batch_size"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, code, named, capsys):
    got, line = ends(error, capsys)
    assert got == code and named in line


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("ours"), OSError("no number")])
def test_what_only_we_can_mend_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_main(main)


def test_a_script_whose_reader_has_gone_ends_quietly(workplace):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from utils.core.errors import run_main\n"
        "def main():\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "run_main(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)],
        cwd=workplace,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141  # 128 + SIGPIPE


def test_the_benchmark_writes_a_row_for_each_job(workplace):
    flags = "--jobs images --seconds 0.01 --size small --device cpu --threads 1 --float32"
    code, out, err = call("experiments/benchmark.py", flags, workplace)
    assert code == 0, err
    (row,) = json.loads((workplace / "logs/benchmark/benchmark.json").read_text())["jobs"]
    assert row["rounds"] >= 2 and row["ratio"] > 0 and f"| {row['job']} |" in out
