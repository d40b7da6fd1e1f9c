"""The end of a run: what it prints, and its report, which is written after all else and may fail."""

import os
import re
import signal
from pathlib import Path

import pytest
from scripts import experiment, prior_flags, start, train_stage_1, train_stage_2, vqgan_flags
from test_resume import wait_for_step

from experiments import get_samples
from utils.core.files import read_json
from utils.display import report

FLAGS = "--train_steps 4 --steps_per_eval 2 --steps_per_log 1"


@pytest.fixture
def here(tmp_path, monkeypatch, reports):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hyperparameters(log_dir):
    page = Path("logs", log_dir, "report.html").read_text()
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_the_report_comes_last_and_validation_is_printed(here, shapes, capsys):
    train_stage_1(shapes, "ae", FLAGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "report: logs/ae/report.html" and any(line.startswith("written: checkpoint") for line in lines)
    page = Path("logs/ae/report.html").read_text()
    assert "Finished: step 4 of 4" in page and "next, a prior over these codes" in page  # in the lines of log.txt
    rows = [line for line in Path("logs/ae/stats.jsonl").read_text().splitlines() if "val_l1" in line]
    printed = [line for line in lines if line.startswith("validation at step ")]
    assert [line.split(":")[0] for line in printed] == ["validation at step 2", "validation at step 4"]
    value = float(re.search(r'"val_l1": ([\d.e-]+)', rows[-1])[1])
    assert f"val_l1 {value:.4g}" in printed[-1] and "val_nll_loss" in printed[-1]
    train_stage_2(shapes, "prior", "ae", 4, FLAGS)
    out = capsys.readouterr().out
    assert re.search(r"^validation at step 4: val_loss [\d.]+, val_bits [\d.]+$", out, re.MULTILINE)
    assert out.endswith("report: logs/prior/report.html\n")
    shown = hyperparameters("prior")
    assert (shown["perceptual_weight"], shown["ndf"], shown["lr"]) == ("0", "8", "0.001")


def test_a_report_that_cannot_be_written_is_a_warning(here, shapes, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "atomic_write", full)
    train_stage_1(shapes, "ae", FLAGS)
    out = capsys.readouterr().out
    assert "warning: logs/ae/report.html could not be written (No space left on device); to try again:\n" in out
    assert out.rstrip().endswith("show_run.py --log_dir ae --no_visdom")
    assert not os.path.exists("logs/ae/report.html")


def test_an_interrupt_during_the_report_loses_nothing(here, shapes, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_stage_1(shapes, "ae", FLAGS)
    out = capsys.readouterr().out
    assert "written: checkpoint of step 4" in out and "next, a prior over these codes" in out
    assert read_json("logs/ae/config.json")["checkpoint"] == 4
    train_stage_1(shapes, "ae", "--resume --train_steps 5")  # the folder is free
    assert "resumed logs/ae after step 4" in capsys.readouterr().out and os.path.exists("logs/ae/report.html")


def test_a_stopped_run_writes_its_report(here, shapes):
    process = start("train_vqgan.py", vqgan_flags(shapes, "ae", "--train_steps 100000 --steps_per_log 1"), here)
    wait_for_step(here / "logs/ae", 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    lines = Path("out_0.txt").read_text().splitlines()
    assert "continue with --resume" in lines[-3] and lines[-1] == "report: logs/ae/report.html"
    assert "Not finished: step" in Path("logs/ae/report.html").read_text()


def test_the_page_of_samples_shows_how_the_models_were_trained(trained, shapes, monkeypatch, reports, capsys):
    monkeypatch.chdir(trained)
    get_samples.main(experiment(get_samples, prior_flags(shapes, "page", "--n_samples 2 --train_steps 9 --lr 5")))
    shown = hyperparameters("page")
    assert (shown["train_steps"], shown["lr"], shown["ema"], shown["perceptual_weight"]) == ("3", "0.001", "yes", "0")
    assert shown["n_samples"] == "2" and "load_optim" not in shown
    assert capsys.readouterr().out.endswith("report: logs/page/report.html\n")
