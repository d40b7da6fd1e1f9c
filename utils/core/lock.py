"""Ensures that only one process at a time writes the folder of a run.

The process holds a kernel lock (flock) on the file logs/<log_dir>/.lock. The system releases the lock when the process
ends, even if the process is killed. The file names the process that holds the lock. On a file system without locks, the
file logs/<log_dir>/.in_use marks the folder as in use. The process removes this file at its end.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from utils.core.errors import UserError
from utils.core.files import check_appendable, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WAIT_AFTER_RESTART = 60.0  # seconds; after a restart by torchrun, the previous processes may still be ending
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_HELD: set[int] = set()  # the file descriptors of all locks of this process


def _close_inherited() -> None:
    """Close the lock files in a forked child. Otherwise the child would hold the lock until it ends."""
    for fd in _HELD:
        os.close(fd)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class FolderLock:
    """The lock of a run's folder. The folder is created if necessary. Raises UserError if another process holds the
    lock.

    warn: a function that is called with one line of text if the file system has no locks.
    """

    def __init__(self, folder: str | Path, warn: Callable):
        self.folder = Path(folder)
        self.note: Path | None = None
        self.fd: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        check_appendable(self.folder / ".lock")
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            locked = self._lock(fd)
        except BaseException:
            os.close(fd)
            raise
        if locked:
            os.ftruncate(fd, 0)
            os.write(fd, _owner().encode())
            self.fd = fd
            _HELD.add(fd)
        else:
            os.close(fd)
            self._leave_note(warn)

    def _lock(self, fd: int) -> bool:
        """Take the lock. Returns True, or False if the file system has no locks."""
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        deadline = time.monotonic() + (WAIT_AFTER_RESTART if restarted else 0.0)
        while fcntl is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.folder} is in use by {_described(self.folder / '.lock')}: wait until it ends, or give "
                        "another --log_dir"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break
        return False

    def _leave_note(self, warn: Callable) -> None:
        note = self.folder / ".in_use"
        try:
            with open(note, "x", encoding="utf-8") as file:
                file.write(_owner())
        except FileExistsError:
            raise UserError(
                f"{self.folder} is in use by {_described(note)} (its file system has no locks): give another "
                f"--log_dir, or, if that process has ended, remove {note}"
            ) from None
        self.note = note
        warn(f"warning: the file system of {self.folder} has no locks: {note} marks the folder as in use")

    def release(self) -> None:
        """Let other processes write the folder."""
        if self.fd is not None:
            _HELD.discard(self.fd)
            os.close(self.fd)
        if self.note is not None:
            self.note.unlink(missing_ok=True)
        self.fd = self.note = None


def _owner() -> str:
    return json.dumps(dict(pid=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S")))


def _described(path: Path) -> str:
    """Return a description of the process that holds the lock. If the file is still being written, the description is
    general."""
    try:
        owner = read_json(path)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
