"""The same seed gives the same run, and what only looks at a run (evaluation, pictures, logs, checkpoints, the
dashboard), or how many processes decode, never changes what it learns."""

import pytest
from test_resume import assert_same_runs, assert_same_weights

from faults.forks import forked
from faults.stages import STAGES

LAST = 12
FLAGS = ("--train_steps", str(LAST))
BOTH = pytest.mark.parametrize("stage", STAGES)

# What is looked at, and how often; the runs of `whole` look every third step.
LOOKING = {
    "seldom": "--steps_per_eval 1000 --steps_per_save_output 0 --steps_per_display_output 0 --steps_per_log 5 "
    "--steps_per_checkpoint 0",
    "at every step": "--steps_per_eval 1 --steps_per_save_output 1 --steps_per_display_output 1 --save_individually "
    "--steps_per_checkpoint 1 --keep_checkpoints 2",
    "with a dashboard that is not there": "--visdom --visdom_port 1",
    "one process decodes": "--num_workers 1",
    "three processes decode": "--num_workers 3",
}


@BOTH
def test_the_same_seed_gives_the_same_run(stage, whole, place):
    same, _ = whole(stage, *FLAGS)
    outcome = forked(STAGES[stage](*FLAGS), place)
    assert outcome.code == 0, outcome.text
    assert_same_runs(same, place / "logs" / "run", LAST)
    for path in (same / "saved_models").glob("*.th"):
        assert path.read_bytes() == (place / "logs" / "run" / "saved_models" / path.name).read_bytes()


@BOTH
def test_another_seed_gives_another_run(stage, whole, place):
    same, _ = whole(stage, *FLAGS)
    assert forked(STAGES[stage](*FLAGS, "--seed", "1"), place).code == 0
    with pytest.raises(AssertionError):
        assert_same_weights(same, place / "logs" / "run", LAST)


@BOTH
@pytest.mark.parametrize("how", LOOKING)
def test_looking_at_a_run_does_not_change_it(stage, how, whole, place):
    same, _ = whole(stage, *FLAGS)
    outcome = forked(STAGES[stage](*FLAGS, *LOOKING[how].split()), place)
    assert outcome.code == 0, outcome.text
    assert_same_weights(same, place / "logs" / "run", LAST)
