"""Runs of the program in forked processes, and the disk under them.

Importing torch takes seconds, a fork some milliseconds: the tests' process has everything imported and one
thread, and each run is a child of it. In the child a Disk can stand between the program and the file system:
every operation that changes the latter is an event, which is counted, refused, or the last thing that happens.
"""

import errno
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter, namedtuple
from pathlib import Path

import utils.core.files
import utils.training.run
from utils.core.errors import run_main

LIMIT = 120.0  # seconds that a run of the tests' size may take, on a busy machine: beyond, it loops
UNCAUGHT = 99  # exit code of a child that ended in a traceback

Outcome = namedtuple("Outcome", "code text")  # code: exit code, or minus the signal that ended it


def forked(work, folder, disk=None, kill_after=None, limit=LIMIT):
    """Call work() as a script is called, in a child process whose current folder is `folder`.

    disk: a Disk to stand under it. kill_after: SIGKILL it after so many seconds. Returns an Outcome.
    """
    out = Path(folder) / "out.txt"
    pid = os.fork()
    if pid == 0:
        child(work, folder, out, disk)
    deadline = time.monotonic() + (limit if kill_after is None else kill_after)
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert kill_after is not None, f"the run did not end in {limit:.0f} s:\n{out.read_text()}"
            break
        time.sleep(0.002)
        done, status = os.waitpid(pid, os.WNOHANG)
    return Outcome(os.waitstatus_to_exitcode(status), out.read_text(errors="replace"))


def child(work, folder, out, disk):
    """The child's life; it never returns."""
    code = UNCAUGHT
    try:
        fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(fd, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (for as long as the child lives)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        if disk is not None:
            disk.install()
        run_main(work)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        if disk is not None:
            disk.leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------------- the disk

# step: the run's last finished step; file: its path without what is random in it; nth of these at this step
Event = namedtuple("Event", "step kind file nth")

PASSED = ("fsync", "replace", "unlink", "mkdir", "write", "open")  # of os; the rest are methods of open files
_REAL = {name: getattr(os, name) for name in PASSED}
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp$")


class Disk:
    """Events of one process, in order. act(disk, number, event, do, half) decides what becomes of each: do()
    does it, half() writes half of it (None where there is nothing to halve)."""

    def __init__(self, act=None, record=None):
        self.act, self.record = act or (lambda disk, number, event, do, half: do()), record
        self.step, self.number, self.seen, self.events = 0, 0, Counter(), []

    def install(self):
        """Stand under the program (in a process that is ours alone: nothing is undone)."""
        utils.core.files.open = self.open_file
        for name in PASSED:
            setattr(os, name, getattr(self, name))
        after_step = utils.training.run.Run._after_step

        def noting_the_step(run):
            self.step = run.step
            after_step(run)

        utils.training.run.Run._after_step = noting_the_step

    def leave(self):
        """Write down the events for the tests' process."""
        for name in PASSED:
            setattr(os, name, _REAL[name])
        if self.record is not None:
            Path(self.record).write_text(json.dumps(self.events))

    def happen(self, kind, path, do, half=None):
        folder, name = os.path.split(os.path.relpath(path))
        place = self.step, kind, os.path.join(folder, _TEMPORARY.sub(r"\1~", name))
        event = Event(*place, self.seen[place])
        self.seen[place] += 1
        number, self.number = self.number, self.number + 1
        self.events.append(event)
        return self.act(self, number, event, do, half)

    # What the program calls.

    def open_file(self, path, mode="r", buffering=-1, **kw):
        """open, of the modules that write."""
        if mode.startswith("r"):
            return open(path, mode, buffering, **kw)
        assert "b" in mode, "text is not written by this program"
        raw = self.happen("open", path, lambda: _Raw(self, os.fspath(path), mode.replace("b", "")))
        return io.BufferedWriter(raw) if buffering else raw

    def fsync(self, fd):
        return self.happen("fsync", _path_of(fd), lambda: _REAL["fsync"](fd))

    def replace(self, source, target):
        return self.happen("replace", target, lambda: _REAL["replace"](source, target))

    def unlink(self, path, **kw):
        return self.happen("unlink", path, lambda: _REAL["unlink"](path, **kw))

    def mkdir(self, path, *args, **kw):
        return self.happen("mkdir", path, lambda: _REAL["mkdir"](path, *args, **kw))

    def write(self, fd, data):
        """os.write, except for writes to the terminal."""
        if fd < 3:
            return _REAL["write"](fd, data)
        return self.happen(
            "write", _path_of(fd), lambda: _REAL["write"](fd, data), lambda: _REAL["write"](fd, data[: len(data) // 2])
        )

    def open(self, path, flags, *args, **kw):
        def do():
            return _REAL["open"](path, flags, *args, **kw)

        return self.happen("open", path, do) if flags & (os.O_WRONLY | os.O_RDWR) else do()


class _Raw(io.FileIO):
    """A file under its buffer: a write here is one that reaches the disk."""

    def __init__(self, disk, path, mode):
        super().__init__(path, mode)
        self.disk = disk

    def write(self, data):
        def part(n):
            return io.FileIO.write(self, memoryview(data)[:n])

        n = len(data)
        return self.disk.happen("write", self.name, lambda: part(n), lambda: part(n // 2))

    def truncate(self, size=None):
        return self.disk.happen("truncate", self.name, lambda: io.FileIO.truncate(self, size))


def _path_of(fd):
    return os.readlink(f"/proc/self/fd/{fd}")


def read_events(path):
    """What a Disk recorded, but for what happened outside the run's folder."""
    events = [Event(*values) for values in json.loads(Path(path).read_text())]
    return [event for event in events if not event.file.startswith("..")]


# ---------------------------------------------------------------------- what becomes of an event


def die_at(target, how):
    """The process is killed 'before' or 'after' this event, or with half of it done ('torn')."""

    def act(disk, number, event, do, half):
        if event != target:
            return do()
        if how == "after" or (how == "torn" and half is None):
            do()
        elif how == "torn":
            half()
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def signal_at(target, *numbers):
    """These signals come in the middle of this event."""

    def act(disk, number, event, do, half):
        if event == target:
            for n in numbers:
                os.kill(os.getpid(), n)
        return do()

    return act


REFUSED = {
    errno.ENOSPC: ("open", "write", "mkdir", "fsync"),
    errno.EROFS: ("open", "write", "mkdir", "fsync", "replace", "unlink", "truncate"),
    errno.EACCES: ("open", "mkdir", "replace", "unlink"),
}


def refuse_from(target, number):
    """From this event on, every write fails with the error of this number: disk full, read-only, no permission."""
    refusing = False

    def act(disk, _, event, do, half):
        nonlocal refusing
        first, refusing = event == target, refusing or event == target
        if not refusing or event.kind not in REFUSED[number] or (event.kind == "mkdir" and os.path.isdir(event.file)):
            return do()
        if first and half is not None and number == errno.ENOSPC:
            return half()  # as a disk does: what fits is written, and the next write fails
        path = () if event.kind in ("write", "fsync") else (event.file,)
        raise OSError(number, os.strerror(number), *path)

    return act
