"""A run whose dashboard fails: the run is not affected, and its curves are complete when the server works again."""

import json
import statistics
import time

import pytest
import test_dashboard
from conftest import TINY_SAMPLER, free_port, words
from test_dashboard import until

import train_sampler
import utils.training.run
import utils.training.run_display
from faults.stages import SMALL
from hparams import get_hparams
from utils.display import live_dashboard

STEPS = 240
FLAGS = [
    *TINY_SAMPLER,
    *SMALL,
    *words(
        "--sampler absorbing --ae_load_dir ae --ae_load_step 2 --log_dir run --steps_per_log 1 "
        "--steps_per_checkpoint 0 --steps_per_save_output 0 --steps_per_display_output 20 "
        "--visdom --visdom_server 127.0.0.1"
    ),
]
TROUBLES = ("stop", "hang", "500", "500 later")


fake = test_dashboard.fake  # the fixture


@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_curves_are_complete_in_the_end(trouble, place, fake, monkeypatch, few_or_all, figures, capsys):
    """In trouble for every second stretch of the run. In one run also: the time of a step with and without."""
    steps = few_or_all(STEPS, 5 * STEPS)
    stretch, seconds, now = steps // 6, dict(well=[], ill=[]), dict(state="well", at=None)
    after_step = utils.training.run.Run._after_step

    def turn(state):
        now["state"] = state
        if trouble != "stop":
            fake.mode = trouble if state == "ill" else "ok"
        elif state == "ill":
            fake.stop()
        else:
            fake.empty()
            fake.start()

    def noting(run):
        after_step(run)
        here = time.perf_counter()
        if now["at"] is not None:
            seconds[now["state"]].append(here - now["at"])
        if run.step % stretch == 0 and run.step < steps:
            turn("ill" if now["state"] == "well" else "well")
            here = time.perf_counter()
        if run.step == steps and now["state"] == "ill":
            turn("well")
        now["at"] = here

    plain = live_dashboard.Dashboard
    monkeypatch.setattr(
        utils.training.run_display,
        "Dashboard",
        lambda *args, **kw: plain(*args, interval=0.02, backoff=(0.02, 0.1), timeouts=(0.3, 0.5), **kw),
    )
    monkeypatch.setattr(utils.training.run.Run, "_after_step", noting)
    monkeypatch.chdir(place)
    flags = [*FLAGS, "--train_steps", str(steps), "--visdom_port", str(fake.port)]
    train_sampler.train(get_hparams("sampler", "", flags, script="train_sampler"))
    with open("logs/run/stats.jsonl") as f:
        losses = [(row["step"], row["loss"]) for row in map(json.loads, f) if "loss" in row]
    assert len(losses) == steps
    until(lambda: fake.curves().get("loss", {}).get("train") == losses, seconds=20)
    assert not fake.failures
    ratio = statistics.median(seconds["ill"]) / statistics.median(seconds["well"])
    figures(f"a dashboard in trouble: {trouble}")["its curves complete"] += 1
    with capsys.disabled():
        print(f"\n{trouble}: the median step took {ratio:.2f} of its time with a dashboard that is well")


def test_a_server_that_never_was(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    flags = [*FLAGS, "--train_steps", "20", "--visdom_port", str(free_port())]
    train_sampler.train(get_hparams("sampler", "", flags, script="train_sampler"))
    assert capsys.readouterr().out.count("--no_visdom") == 1
