"""Jobs of several processes in tests: forked ones, which share what this process has imported, and torchrun's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, free_port
from faults.forks import child

LIMIT = 120.0  # seconds for a job, on a busy machine


def together(size, work, folder, codes=None):
    """Call work() in `size` forked processes of one job, as a script is called, in `folder`. Returns what each printed.

    codes: their exit codes (default: all 0).
    """
    env = dict(
        WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
        TORCHELASTIC_ERROR_FILE=Path(folder, "attempt", "0", "error.json"),
    )
    Path(folder, "attempt").mkdir(exist_ok=True)
    Path(folder, "attempt", "told").unlink(missing_ok=True)
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ.update({k: str(v) for k, v in dict(env, RANK=rank, LOCAL_RANK=rank).items()})
            child(work, folder, Path(folder) / f"out_{rank}.txt", None)
        pids.append(pid)
    deadline = time.monotonic() + LIMIT
    got = [wait(pid, deadline) for pid in pids]
    texts = [(Path(folder) / f"out_{rank}.txt").read_text() for rank in range(size)]
    assert got == (codes or [0] * size), "\n---\n".join(texts)
    return texts


def wait(pid, deadline):
    """The exit code of a child, or minus the signal that ended it."""
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
        done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status)


def torchrun(size, script, flags, cwd, *options):
    """A job of PyTorch's launcher, in a session of its own; its output goes to torchrun.txt in cwd."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        size,
        "--master_port",
        free_port(),
        *options,
        ROOT / script,
        *flags,
    ]
    with open(Path(cwd) / "torchrun.txt", "w") as out:
        return subprocess.Popen(
            [str(w) for w in words], cwd=cwd, env=env, stdout=out, stderr=out, start_new_session=True
        )
