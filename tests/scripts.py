"""Running the training scripts in tests: in this process, or as a user would."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, TINY_SAMPLER, TINY_VQGAN, words

import train_sampler
import train_vqgan
from hparams import get_hparams


def vqgan_flags(images, log_dir, more=""):
    return [
        *TINY_VQGAN,
        "--dataset",
        "custom",
        "--custom_dataset_path",
        str(images),
        "--log_dir",
        log_dir,
        *words(more),
    ]


def sampler_flags(images, log_dir, ae, step, more="", sampler="absorbing"):
    return [
        *TINY_SAMPLER,
        "--sampler",
        sampler,
        "--dataset",
        "custom",
        "--custom_dataset_path",
        str(images),
        "--log_dir",
        log_dir,
        "--ae_load_dir",
        ae,
        "--ae_load_step",
        str(step),
        *words(more),
    ]


def train_stage_1(*args):
    """In this process, in the current folder."""
    train_vqgan.train(get_hparams("vqgan", "", vqgan_flags(*args), script="train_vqgan"))


def train_stage_2(*args, **kw):
    train_sampler.train(get_hparams("sampler", "", sampler_flags(*args, **kw), script="train_sampler"))


def start(script, flags, cwd):
    """A process of its own, one thread, output to files in cwd."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    number = len(list(Path(cwd).glob("out_*.txt")))
    out = open(Path(cwd) / f"out_{number}.txt", "w")  # noqa: SIM115 (the process keeps it)
    return subprocess.Popen([sys.executable, str(ROOT / script), *flags], cwd=cwd, env=env, stdout=out, stderr=out)


def run(script, flags, cwd, code=0):
    """Run to the end; returns what it printed."""
    process = start(script, flags, cwd)
    got = process.wait(timeout=300)
    text = sorted(Path(cwd).glob("out_*.txt"), key=lambda p: int(p.stem[4:]))[-1].read_text()
    assert got == code, text
    assert "Traceback" not in text, text
    return text


def experiment(module, words):
    """The configuration of a command line of experiments/<module>."""
    return get_hparams(argv=words, script=module.__name__.rsplit(".", 1)[-1], **module.COMMAND_LINE)


def prior_flags(images, log_dir, more="", sampler="absorbing"):
    """Flags of an experiment on the models of the fixture `trained`."""
    load = "--load_dir prior" if sampler == "absorbing" else "--load_dir ar"
    return sampler_flags(images, log_dir, "ae", 4, [*words(load), "--load_step", "3", *words(more)], sampler)
