"""Writes files that are complete or absent, and reads files without running code in them.

Only the functions that write or read tensors import torch. Programs that inspect a run therefore start fast.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import secrets
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from utils.core.errors import DamagedFile, UserError
from utils.core.json_files import hash_json, parse_json, read_json  # noqa: F401 (in a module that hparams may import)


def fsync_folder(folder: str | Path) -> None:
    """Make a rename in this folder durable. Do nothing if the system cannot synchronise folders."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _HashingFile:
    """Writes bytes to a file and hashes them."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Any]:
    """Open a temporary file next to `path` (.<name>.<...>.tmp) for binary writing. On success the temporary file is
    flushed to the disk and renamed to `path`. On any error the temporary file is removed. The file object has a hash of
    the written bytes (`.sha256`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield _HashingFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # torch's zip writer wraps the disk's error; the user needs the original message and the name of the file.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        cause.filename = cause.filename or str(path)
        raise cause from None
    fsync_folder(path.parent)


def remove_temporaries(folder: str | Path, unused_for: float = 0.0) -> None:
    """Remove the temporary files in a folder. A process that is killed in atomic_write leaves such a file, which can be
    large.

    unused_for: a time in seconds. Files that were modified within this time remain, because another process may be
    writing them.
    """
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name):
            with contextlib.suppress(OSError):  # the file may be in use or read-only, or may not exist any more
                if time.time() - path.stat().st_mtime >= unused_for:
                    path.unlink()


def check_appendable(path: str | Path) -> None:
    """Raise UserError if a path exists and is not a regular file. The folder of a run may come from another person. A
    link in the folder could lead to any file of the user, and a pipe would block."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        link = f"a symbolic link to {os.readlink(path)}" if stat.S_ISLNK(mode) else ""
        kind = link or ("a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device")
        raise UserError(f"{path} is {kind}, not a regular file: remove it, or put a regular file in its place")


def _open_to_append(path: str | Path) -> Any:
    """Open a file for appending. O_NOFOLLOW and O_NONBLOCK protect against a link or pipe that appears after
    check_appendable. Windows does not have these two flags."""
    check_appendable(path)
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | more, 0o666))


class Lines:
    """A file that grows by complete lines. Each line is written at once, without a buffer.

    The attributes size and sha256 (a hex digest) describe the contents. The constructor raises UserError if the path is
    not a regular file (see check_appendable).
    """

    def __init__(self, path: str | Path, keep: int | None = None):
        """keep: truncate the file to this number of bytes (default: no limit). An incomplete last line is removed, too.
        Some editors remove the last line break. A complete last row without a line break is therefore kept, and a line
        break is added."""
        self.path = path
        self.file = _open_to_append(path)
        content = Path(path).read_bytes()
        kept = content[:keep]
        end = kept.rfind(b"\n") + 1
        complete = _is_row(kept[end:])
        kept = kept if complete else kept[:end]
        if kept != content:
            self.file.truncate(len(kept))
        if complete:
            self.file.write(b"\n")
            kept += b"\n"
        self.size, self._hash = len(kept), hashlib.sha256(kept)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def append(self, line: str) -> None:
        """Write one complete line. If the disk fails, write nothing."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        done = 0
        try:
            while done < len(data):  # a nearly full disk may write only a part
                done += self.file.write(data[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(self.size)
            error.filename = str(self.path)
            raise
        self.size += len(data)
        self._hash.update(data)

    def sync(self) -> None:
        """Flush the appended lines to the disk."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        self.file.close()


def _is_row(data: bytes) -> bool:
    """Return whether bytes are a complete JSON object. An interrupted write leaves only the start of an object."""
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path) as f:
        f.write((json.dumps(value, indent=1, sort_keys=False) + "\n").encode())


def save_tensors(path: str | Path, value: Any) -> dict:
    """Save a value with torch.save, atomically. Returns dict(bytes, sha256) for a manifest."""
    import torch

    with atomic_write(path) as f:
        torch.save(value, f)
        digest = f.sha256.hexdigest()
    return dict(bytes=os.path.getsize(path), sha256=digest)


def require_file(path: str | Path) -> None:
    """Raise UserError unless the path is a regular file (reading from a pipe would block)."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a file")
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")


def load_tensors(path: str | Path) -> Any:
    """Load a file with torch.load. Only tensors and plain values are accepted, so that the file cannot run code.

    Raises UserError if the file is missing, and DamagedFile if the file cannot be read.
    """
    import torch

    require_file(path)
    try:
        with warnings.catch_warnings():  # torch would also warn about files that are refused below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise DamagedFile(f"{path} is refused: damaged, or holds more than tensors ({_first_line(error)})") from None
    except Exception as error:  # torch.load can raise any exception for arbitrary bytes
        raise DamagedFile(f"{path} is damaged and cannot be read ({_first_line(error)})") from None


def load_npy(path: str | Path) -> np.ndarray:
    """Load a .npy file as an array, without running code in the file. Raises UserError if the file is missing, and
    DamagedFile if the file cannot be read."""
    require_file(path)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # numpy's parser can raise any exception for a damaged header
        raise DamagedFile(f"{path} is no readable .npy file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as a hex digest. The file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def hash_tensors(state_dict: dict) -> str:
    """Return a hex digest of a state dict. The digest covers names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
