"""Files that are complete or absent, and reading that never executes anything.

torch is imported where tensors are written or read: what only looks at a run need not wait for it.
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
from pathlib import Path

import numpy as np

from utils.core.errors import DamagedFile, UserError
from utils.core.json_files import hash_json, parse_json, read_json  # noqa: F401 (in a module that hparams may import)


def fsync_folder(folder):
    """Make a rename in this folder durable (a no-op where the system cannot)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _HashingFile:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file beside `path` (.<name>.<...>.tmp) for binary writing; on success it is flushed to
    the disk and renamed to `path`, on any error removed. The file object hashes what it is given (`.sha256`)."""
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
        # torch's zip writer wraps the disk's error; the user needs the disk's own words, and which file.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        cause.filename = cause.filename or str(path)
        raise cause from None
    fsync_folder(path.parent)


def remove_temporaries(folder, unused_for=0.0):
    """Remove what processes that were killed within atomic_write left in a folder: it can be large.

    unused_for: only what nobody has written to for so many seconds: where others may be writing now.
    """
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name):
            with contextlib.suppress(OSError):  # it was in use, another process is as tidy, the place read-only
                if time.time() - path.stat().st_mtime >= unused_for:
                    path.unlink()


def check_appendable(path):
    """UserError if a path holds anything but a regular file. A run's folder may come from someone else: a link in it
    could lead to any file of the user, and a pipe would block."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        link = f"a symbolic link to {os.readlink(path)}" if stat.S_ISLNK(mode) else ""
        kind = link or ("a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device")
        raise UserError(f"{path} is {kind}, not a regular file: remove it, or put a regular file in its place")


def _open_to_append(path):
    """The flags cover what appears at the path after the check. Windows has neither of them."""
    check_appendable(path)
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | more, 0o666))


class Lines:
    """A file that grows by whole lines, each handed to the system at once.

    size and sha256 (a hex digest) are of what it holds. UserError for anything but a regular file (check_appendable).
    """

    def __init__(self, path, keep=None):
        """keep: cut the file back to so many bytes (default: all of it). A last line without its end is cut off, too,
        unless it is a complete row (as an editor leaves it), which then gets its end."""
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
    def sha256(self):
        return self._hash.hexdigest()

    def append(self, line):
        """Write one line: all of it, or, where the disk does not take it, nothing."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        done = 0
        try:
            while done < len(data):  # a disk that is nearly full takes a part
                done += self.file.write(data[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(self.size)
            error.filename = str(self.path)
            raise
        self.size += len(data)
        self._hash.update(data)

    def sync(self):
        """Make what was appended durable."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self):
        self.file.close()


def _is_row(data):
    """Whether bytes are a JSON object. What a write that was cut off leaves of one is none."""
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def write_json(path, value):
    """Write JSON atomically, readable by people."""
    with atomic_write(path) as f:
        f.write((json.dumps(value, indent=1, sort_keys=False) + "\n").encode())


def save_tensors(path, value):
    """torch.save, atomically. Returns dict(bytes, sha256) for a manifest."""
    import torch

    with atomic_write(path) as f:
        torch.save(value, f)
        digest = f.sha256.hexdigest()
    return dict(bytes=os.path.getsize(path), sha256=digest)


def require_file(path):
    """UserError where there is none (a pipe would keep its reader waiting for ever)."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a file")
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")


def load_tensors(path, map_location="cpu"):
    """torch.load of tensors and plain values only: a file cannot run code.

    Raises UserError where the file is missing, DamagedFile where it cannot be read.
    """
    import torch

    require_file(path)
    try:
        with warnings.catch_warnings():  # of torch, on files that are refused below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise DamagedFile(f"{path} is refused: damaged, or holds more than tensors ({_first_line(error)})") from None
    except Exception as error:  # bytes that are no checkpoint can make the reader raise anything
        raise DamagedFile(f"{path} is damaged and cannot be read ({_first_line(error)})") from None


def load_npy(path):
    """A .npy file as an array; it cannot run code. Raises UserError where it is
    missing, DamagedFile where it cannot be read."""
    require_file(path)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a damaged header numpy's parser raises anything
        raise DamagedFile(f"{path} is no readable .npy file ({_first_line(error)})") from None


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def sha256_file(path):
    """Hex digest of a file's contents, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def hash_tensors(state_dict):
    """Hex digest of a state dict: names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
