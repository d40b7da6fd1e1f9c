"""The rank of this process in its job, from torchrun's environment variables, and the folder of all runs. Standard
library only."""

import contextlib
import os
from pathlib import Path

LOGS = Path("logs")


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    """The rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size():
    """How many processes of the job this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    """True in the one process that writes, logs and sends to the dashboard."""
    return rank() == 0


def first_to_tell():
    """Whether no other process of the job has reported an error on this machine (since torchrun's last restart).

    All processes meet the same mistake at once, and when one ends, the others lose their connection to it. Only the
    first one reports an error.
    """
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <a folder for each start>/<local rank>/error.json
    if world_size() > 1 and record:
        with contextlib.suppress(OSError):  # not writable: all processes report
            told = os.path.join(os.path.dirname(os.path.dirname(record)), "told")
            try:
                os.close(os.open(told, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
    return True
