"""SIGKILL at chosen and at random moments: what was written before is complete, and --resume continues bit for bit."""

import itertools
import os
import random
import signal

import pytest

from faults.forks import Disk, die_at, forked, signal_at
from faults.stages import STAGES, assert_nothing_half_counts, assert_same_and_tidy, draw
from utils.core.checkpoint import Checkpoints

LAST = 7
DURATION = 1.5  # seconds, about, of a run: for kills at random times
KILLS_IN_A_ROW = 5

WHERE = {
    "in a checkpoint": lambda event: "/saved_" in event.file,
    "in codes": lambda event: event.file.startswith("latents"),
    "at the start": lambda event: event.step == 0 and event.file.startswith("logs/run"),
    "elsewhere": lambda event: "/saved_" not in event.file and not event.file.startswith("latents"),
}
RANDOM_TIME = "at a random time"
# Again and again in this order; the writing of checkpoints and of codes weighs most.
TURNS = {
    "vqgan": ["in a checkpoint"] * 3
    + ["elsewhere"]
    + ["in a checkpoint"] * 3
    + ["at the start"]
    + ["in a checkpoint"] * 3
    + [RANDOM_TIME],
    "sampler": ["in codes", "in a checkpoint", "in a checkpoint", "elsewhere"]
    + ["in codes", "in a checkpoint", "in a checkpoint", "at the start"]
    + ["in codes", "in a checkpoint", "in a checkpoint", RANDOM_TIME],
}


def moments(rng, events, turns):
    """[(where, event to die at or None)], ordered so that the resumed run reaches each of them."""
    drawn = []
    for where in turns:
        event = None if where == RANDOM_TIME else draw(rng, filter(WHERE[where], events))
        anywhere = where in (RANDOM_TIME, "at the start")  # comes in every resumed run
        drawn.append((rng.randrange(len(events)) if anywhere else events.index(event), where, event))
    return [moment[1:] for moment in sorted(drawn, key=lambda moment: moment[0])]


def kill_and_resume(work, place, rng, moments):
    """Kill a run at each of these moments, resume it each time, and then to its end. Returns where it was killed."""
    killed = []
    for where, event in moments:
        if event is None:
            outcome = forked(work, place, kill_after=rng.uniform(0, DURATION))
        else:
            outcome = forked(work, place, Disk(die_at(event, rng.choice(("before", "after", "torn")))))
        assert outcome.code in (0, -signal.SIGKILL), outcome.text
        assert_nothing_half_counts(place)
        if outcome.code == 0:  # that moment had passed
            break
        killed.append(where)
    outcome = forked(work, place)
    assert outcome.code == 0, outcome.text
    return killed


@pytest.mark.parametrize(("stage", "few", "everything"), [("vqgan", 4, 90), ("sampler", 8, 130)])
def test_killed_runs_equal_the_uninterrupted(stage, few, everything, few_or_all, whole, new_place, figures):
    tried, goal, rng = figures(f"SIGKILL, {stage}"), few_or_all(few, everything), random.Random(stage)
    turns = itertools.cycle(TURNS[stage])
    for keep in itertools.cycle(("0", "2")):
        if (left := goal - sum(tried.values())) <= 0:
            break
        flags = "--train_steps", str(LAST), "--keep_checkpoints", keep
        same, events = whole(stage, *flags)
        place, work = new_place(), STAGES[stage](*flags, "--resume")
        drawn = moments(rng, events, itertools.islice(turns, min(KILLS_IN_A_ROW, left)))
        tried.update(kill_and_resume(work, place, rng, drawn))
        assert_same_and_tidy(same, place, LAST)


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_two_signals_while_a_checkpoint_is_written(first, second, whole, place):
    same, events = whole("vqgan", "--train_steps", str(LAST))
    writes = [e for e in events if e.kind == "write" and e.file.endswith("ae_optim_4.th~")]
    work = STAGES["vqgan"]("--train_steps", str(LAST), "--resume")
    outcome = forked(work, place, Disk(signal_at(writes[len(writes) // 2], first, second)))
    assert outcome.code == 128 + second and "Traceback" not in outcome.text, outcome.text
    store = Checkpoints(place / "logs" / "run")
    assert store.steps() == [2] and store.verify(2)
    assert forked(work, place).code == 0
    assert_same_and_tidy(same, place, LAST)


@pytest.mark.parametrize("step", [4, LAST])
def test_a_signal_while_a_checkpoint_is_written_lets_it_finish(step, whole, place):
    """The last checkpoint, too: then the run is done, and that is no failure."""
    _, events = whole("vqgan", "--train_steps", str(LAST))
    writes = [e for e in events if e.kind == "write" and e.file.endswith(f"ae_optim_{step}.th~")]
    work = STAGES["vqgan"]("--train_steps", str(LAST))
    outcome = forked(work, place, Disk(signal_at(writes[0], signal.SIGTERM)))
    assert outcome.code == (0 if step == LAST else 143), outcome.text
    assert Checkpoints(place / "logs" / "run").newest_good(print)[0] == step


def test_what_kills_leave_in_the_folder_of_codes_does_not_pile_up(whole, place):
    flags = "--train_steps", "2"
    _, events = whole("sampler", *flags)
    work = STAGES["sampler"](*flags, "--resume")
    in_the_middle = next(e for e in events if e.kind == "fsync" and e.file.endswith(".pt~"))
    for _ in range(3):
        assert forked(work, place, Disk(die_at(in_the_middle, "before"))).code == -signal.SIGKILL
    left = list((place / "latents").glob(".*.tmp"))
    assert len(left) == 3
    for path in left[:2]:
        os.utime(path, (0, 0))
    assert forked(work, place).code == 0
    assert list((place / "latents").glob(".*.tmp")) == left[2:], "what is new may be another process's"
