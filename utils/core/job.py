"""Which process of its job this one is, as torchrun's environment says. Standard library only."""

import contextlib
import os


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    """Its number among the processes of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size():
    """How many processes of the job this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    """True on the one process that writes, logs and talks to the dashboard."""
    return rank() == 0


def first_to_tell():
    """Whether no other process of the job has told an error on this machine (since torchrun's last restart).

    All meet the same mistake at once, and when one ends, the others lose it: the first alone is to be heard.
    """
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <a folder for each start>/<local rank>/error.json
    if world_size() > 1 and record:
        with contextlib.suppress(OSError):  # a place that cannot be written: all are heard
            told = os.path.join(os.path.dirname(os.path.dirname(record)), "told")
            try:
                os.close(os.open(told, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
    return True
