"""Thousands of steps: memory, open files and threads stay as they were."""

import gc
import json
import os
import resource
import threading

import pytest

import utils.training.run
from faults.forks import forked
from faults.stages import STAGES

MIB = 1 << 20
MOST = 6.0  # MiB that a process may grow by in the second half: what the allocator keeps now and then
OFTEN = (
    "--steps_per_eval 20 --steps_per_save_output 50 --steps_per_display_output 50 --steps_per_checkpoint 50 "
    "--keep_checkpoints 2 --steps_per_log 1"
)


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def in_use():
    """Open files and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))


def measured(work, steps):
    """work(), and at its end a line of JSON: resident bytes at tenths of `steps`, files and threads before, after."""

    def run():
        after_step, sizes = utils.training.run.Run._after_step, []

        def noting(run):
            after_step(run)
            if run.step % (steps // 10) == 0:
                sizes.append(resident())

        utils.training.run.Run._after_step = noting
        before = in_use()
        work()
        print("\n" + json.dumps(dict(sizes=sizes, before=before, after=in_use())))

    return run


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize(
    "more", ["", "--num_workers 2", "--visdom --visdom_port 1"], ids=["plain", "workers", "dashboard"]
)
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_piles_up(stage, more, place, few_or_all, figures, capsys):
    steps = few_or_all(300, 3000)
    work = STAGES[stage](*f"--train_steps {steps} {OFTEN} {more}".split())
    outcome = forked(measured(work, steps), place, limit=1800)
    assert outcome.code == 0, outcome.text
    found = json.loads(outcome.text.splitlines()[-1])
    sizes = [size / MIB for size in found["sizes"]]
    assert found["after"] == found["before"], "files, threads"
    grown = sizes[-1] - sizes[len(sizes) // 2]
    assert grown < MOST, sizes
    figures(f"{steps} steps of {stage} {more}".strip())["without growing"] += 1
    with capsys.disabled():
        print(f"\n{steps} steps of {stage} {more}: {sizes[-1]:.0f} MiB resident, {grown:+.1f} MiB in the second half")
