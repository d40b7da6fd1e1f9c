"""Reports errors that the user can fix, in one line without a traceback. This module imports the standard library
only."""

import atexit
import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from utils.core import job

EXIT_FAILURE = 1
EXIT_USAGE = 2
SIGPIPE = 13  # the number of this signal on Linux and macOS; Windows does not have the signal


def printable(text: object) -> str:
    """Return text that is safe to print on a terminal. Three kinds of characters are escaped: control characters,
    characters that change the writing direction, and bytes that are not text. File names can contain all three kinds.
    Line breaks are kept."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class UserError(ValueError):
    """An error that the user can fix. The message states what is wrong and how to fix the error. The exit code is 1."""

    exit_code = EXIT_FAILURE

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(UserError):
    """An error in the command line or in the configuration. The exit code is 2."""

    exit_code = EXIT_USAGE


class DamagedFile(UserError):
    """The contents of an existing file are wrong: the file is truncated, altered, or of another kind."""


def fail(message: object, exit_code: int = EXIT_FAILURE) -> NoReturn:
    """Print one line to stderr and exit. If several processes of a job fail at the same time, only one prints."""
    try:
        sys.stdout.flush()
    except OSError:  # the pipe is closed or the disk is full
        discard_output()
    if job.first_to_report():
        warn(f"error: {printable(' '.join(str(message).splitlines()))}")
    sys.exit(exit_code)


def warn(line: str) -> None:
    """Print a line to stderr. If stderr is closed, do nothing."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """From now on, discard everything that is written to stdout. Otherwise Python would fail again at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_is_gone() -> bool:
    """Return whether stdout is a pipe that no program reads any more. `| head` ends early and leaves such a pipe."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def quit_quietly_at_interrupt() -> None:
    """Make Ctrl-C end the process without a traceback until run_main is called. There is nothing to clean up so early,
    while torch is being imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a parent process may have set SIG_IGN
        signal.signal(signal.SIGINT, _quit)


def _quit(*_: object) -> None:
    os._exit(128 + signal.SIGINT)


def run_main(main: Callable, *args: Any) -> None:
    """Call main(*args) and turn the errors that a user can fix into one line and an exit code."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed the stream (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
    try:
        main(*args)
        sys.stdout.flush()
        if job.world_size() > 1:
            # Threads of PyTorch's communication sometimes abort a process of a job that exits in the usual way.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except UserError as error:
        fail(error, error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        if error.errno is None:
            raise
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            discard_output()
            sys.exit(128 + SIGPIPE)  # the exit status that a shell reports for a program that SIGPIPE ended
        place = f": {error.filename}" if error.filename else ""
        fail(f"{error.strerror}{place}{_disk_hint(error)}")
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"torch.compile does not work here ({' '.join(str(error).split())[:200]}); train with --compile off")
        # torch's signal handler raises this error if a worker dies between batches.
        if str(error).startswith("DataLoader worker"):
            fail(f"{str(error).splitlines()[0]}: a process that decodes images ended; try --num_workers 0")
        if _is_loss_of_others(error):
            fail(
                "another process of this job has ended, and this one cannot continue alone (the error is printed "
                "above, or in the output of its machine); the last complete checkpoint is intact: --resume continues it"
            )
        if not _is_out_of_memory(error):
            raise
        fail(
            f"the memory is full ({(str(error).splitlines() or ['no detail'])[0]}); lower --batch_size, or use "
            "--amp, a smaller --nf or --bert_n_emb, or another --device"
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory is full. PyTorch has a class for this error on CUDA only; for other devices, check the
    message."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(w in str(error) for w in words)
    )


def _is_loss_of_others(error: Exception) -> bool:
    """Return whether communication between processes failed. PyTorch has exception classes for NCCL and the store; for
    gloo, check the message."""
    kind, words = type(error).__name__, str(error).lower()
    return job.world_size() > 1 and (kind.startswith("Dist") or "gloo" in words or "nccl" in words)


def _disk_hint(error: OSError) -> str:
    hints = {
        errno.ENOSPC: " (free some space; the last complete checkpoint is intact: --resume continues from it)",
        errno.EFBIG: " (a file-size limit was hit; the last complete checkpoint is intact)",
        errno.EROFS: " (the file system is read-only: choose another place for logs/ and latents/)",
        errno.EACCES: " (no permission: choose another place, or fix the folder's permissions)",
    }
    return hints.get(error.errno or 0, "")
