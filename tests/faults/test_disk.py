"""A disk that is full, read-only, or owned by someone else, at each write in turn. The run prints one clear line and
exits with code 1, and the last checkpoint is intact. When there is space again, --resume continues bit for bit."""

import errno
import os
import random
import resource
import signal

import pytest

from faults.forks import REFUSED, Disk, forked, refuse_from
from faults.stages import (
    EXPERIMENTS,
    STAGES,
    assert_nothing_half_counts,
    assert_same_and_tidy,
    assert_same_results,
    draw,
    leftovers,
)
from utils.core.files import Lines, sha256_file

LAST = 5
FLAGS = ("--train_steps", str(LAST), "--keep_checkpoints", "2")
FAULTS_IN_A_ROW = 8


def assert_one_line(outcome, words):
    """Exit code 1, and exactly one line of the output, the last, is an error that contains `words`."""
    assert outcome.code == 1 and "Traceback" not in outcome.text, outcome.text
    lines = outcome.text.splitlines()
    assert [line for line in lines if "error: " in line] == lines[-1:] and words in lines[-1], outcome.text


def refusable(events, number):
    """The events that this error can meet; of the many writes to a large file the first, the last and one between."""
    groups = {}
    for event in events:
        groups.setdefault(event[:3], []).append(event)
    few = [e for group in groups.values() for e in {*group[:1], *group[len(group) // 2 :][:1], *group[-1:]}]
    new = {e.file for e in events if e.kind == "mkdir" and e.nth == 0}
    made, chosen = set(), []
    for e in sorted(few, key=events.index):
        if e.kind not in REFUSED[number] or (e.kind == "mkdir" and e.file in made):
            continue
        if e.kind == "fsync" and e.file in new:
            continue  # of a folder: a system that cannot do this reports no error
        made.add(e.file)
        chosen.append(e)
    return chosen


def refuse_and_resume(stage, place, events, number):
    """Refuse at each of these events, in order, resuming in between. Returns those that were met."""
    met = []
    work = STAGES[stage](*FLAGS, "--resume")
    for event in events:
        outcome = forked(work, place, Disk(refuse_from(event, number)))
        if outcome.code == 0:  # that write is done already
            break
        met.append(event)
        assert_one_line(outcome, os.strerror(number))
        assert_nothing_half_counts(place)
        if number == errno.ENOSPC:
            assert not leftovers(place), f"{event}: they would fill the disk"
    outcome = forked(work, place)
    assert outcome.code == 0, outcome.text
    return met


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("stage", ["vqgan", "sampler"])
def test_a_disk_that_takes_no_more(stage, number, few_or_all, whole, new_place, figures):
    same, events = whole(stage, *FLAGS)
    rng, tried = random.Random(f"{stage} {number}"), figures(f"{errno.errorcode[number]}, {stage}")
    goal = refusable(events, number)
    count = few_or_all(3 if number == errno.ENOSPC else 1, len(goal) if number == errno.ENOSPC else 30)
    left = goal if count >= len(goal) else sorted({draw(rng, goal) for _ in range(count)}, key=events.index)
    while left:
        place = new_place()
        stride = -(-len(left) // FAULTS_IN_A_ROW)
        met = refuse_and_resume(stage, place, left[::stride], number)
        assert_same_and_tidy(same, place, LAST)
        assert met, f"{left[0]} did not come"
        tried["recovered"] += len(met)
        left = [event for event in left if event not in met]


@pytest.mark.parametrize("stage", ["vqgan", "sampler"])
def test_a_limit_of_the_size_of_files(stage, few_or_all, whole, new_place, figures):
    """The system's own refusal, wherever it comes."""
    same, _ = whole(stage, *FLAGS)
    rng, tried = random.Random(stage), figures(f"RLIMIT_FSIZE, {stage}")
    largest = max(p.stat().st_size for p in same.rglob("*.th"))
    for number in range(few_or_all(1, 20)):
        place, work = new_place(), STAGES[stage](*FLAGS, "--resume")
        limit = int(largest ** rng.uniform(0.3, 0.99)) if number else largest // 2

        def limited(work=work, limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()

        outcome = forked(limited, place)
        assert outcome.code == 1 or limit < 500, outcome.text
        assert_nothing_half_counts(place)
        assert not leftovers(place)
        if limit > 500:  # else the terminal's file is full, too
            assert_one_line(outcome, os.strerror(errno.EFBIG))
        assert forked(work, place).code == 0
        assert_same_and_tidy(same, place, LAST)
        tried["recovered"] += 1


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_a_disk_that_takes_nothing_of_an_experiment(script, few_or_all, trained_place, finished_experiment, figures):
    same, events = finished_experiment(script)
    tried = figures(f"ENOSPC, {script}")
    goal = refusable(events, errno.ENOSPC)
    if len(goal) > (count := few_or_all(4, len(goal))):
        goal = random.Random(script).sample(goal, count)
    for event in goal:
        place = trained_place()
        assert_one_line(forked(EXPERIMENTS[script], place, Disk(refuse_from(event, errno.ENOSPC))), "No space left")
        assert not leftovers(place)
        assert forked(EXPERIMENTS[script], place).code == 0
        assert_same_results(same, place)
        tried["recovered"] += 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_terminal_that_takes_nothing(whole, place):
    """As where the output goes to a file on a full disk; the errors go elsewhere."""
    work = STAGES["vqgan"](*FLAGS, "--resume")

    def to_a_full_disk():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        work()

    assert_one_line(forked(to_a_full_disk, place), "No space left")
    assert forked(work, place).code == 0
    assert_same_and_tidy(whole("vqgan", *FLAGS)[0], place, LAST)


# ---------------------------------------------------------------------- lines


def test_a_line_that_was_not_finished_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"one\ntwo\nthr")
    lines = Lines(path)
    lines.append("caf\u00e9 \udcff")
    assert path.read_bytes() == b"one\ntwo\ncaf\xc3\xa9 \\udcff\n"
    assert (lines.size, lines.sha256) == (path.stat().st_size, sha256_file(path))
    lines.close()
    lines = Lines(path, keep=4)
    assert path.read_bytes() == b"one\n" and (lines.size, lines.sha256) == (4, sha256_file(path))


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    class NearlyFull:
        """Takes ten bytes more."""

        def __init__(self, file):
            self.file, self.left, self.truncate = file, 10, file.truncate

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = self.file.write(data[: self.left])
            self.left -= done
            return done

    lines = Lines(tmp_path / "x.jsonl")
    lines.file = NearlyFull(lines.file)
    lines.append("first")
    with pytest.raises(OSError) as error:
        lines.append("second")
    assert error.value.filename == str(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == b"first\n"
    assert (lines.size, lines.sha256) == (6, sha256_file(tmp_path / "x.jsonl"))
