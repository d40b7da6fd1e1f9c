"""Cache files of tensors. Each file records the inputs of its tensors, and is reused only for the same inputs.

A file holds {name: tensor}, a header, a hash of the tensors, and their origin. The header is a dict of JSON values:
everything that the tensors depend on. For images it contains only names, sizes and times. The origin holds a sample of
the images' contents and the versions of libraries; it is compared when the file is read. A different header gives a
different file name. A file that does not match its header is damaged.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.core import distributed
from utils.core.errors import DamagedFile
from utils.core.files import hash_tensors, load_tensors, remove_temporaries, save_tensors

FORMAT = 1
ABANDONED = 3600.0  # seconds after which a temporary file does not belong to a process that is still writing


def read(path: str | Path, header: dict) -> tuple[dict, Any] | None:
    """Return ({name: tensor}, origin) stored under this header, or None if there is no file. The origin is None in a
    file written by an earlier version.

    Raises DamagedFile if the file does not hold them.
    """
    if not Path(path).exists():
        return None
    value = load_tensors(path)
    try:
        tensors, found, digest, origin = value["tensors"], value["header"], value["sha256"], value.get("origin")
        if not isinstance(tensors, dict):
            raise TypeError
        if value["format"] != FORMAT or found != header or hash_tensors(tensors) != digest:
            raise DamagedFile(f"{path} does not hold what its name says")
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise DamagedFile(f"{path} is damaged: not a cache file") from None
    return tensors, origin


def fits_range(numbers: torch.Tensor, count: int, positions: range) -> bool:
    """Whether a tensor that was read holds `count` distinct int64 numbers from the range `positions`."""
    if numbers.dtype != torch.int64 or numbers.shape != (count,):
        return False
    return len(numbers.unique()) == count and bool(((numbers >= positions.start) & (numbers < positions.stop)).all())


def write(path: str | Path, header: dict, tensors: dict, origin: Any = None) -> None:
    """Store {name: tensor} under this header. The file is complete or absent."""
    digest = hash_tensors(tensors)
    save_tensors(path, dict(format=FORMAT, header=header, tensors=tensors, sha256=digest, origin=origin))


def store(path: str | Path, header: dict, tensors: dict, say: Callable, what: str, origin: Any = None) -> bool:
    """Like write, but only print a warning if the file cannot be written, because the caller still has the tensors.
    Returns True if the file was written."""
    try:
        write(path, header, tensors, origin)
    except OSError as error:
        say(f"warning: the {what} cannot be cached in {path} ({error.strerror}); the next run computes them again")
        return False
    say(f"{what} cached in {path}")
    return True


def versions(*libraries: str) -> dict[str, str]:
    """{library: version} of packages that affect results, by their names in the package index."""
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def is_current(origin: Any, now: dict, path: str | Path, say: Callable, what: str, renew: bool = False) -> bool:
    """Whether a cache may be reused. Reports a difference, or an unknown origin, in one line.

    origin, now: the stored origin, and that of a new cache. Each is dict(versions={library: version}); if images are
    read, it also has `contents`, a digest of some of them. If the contents differ, the cache is not reused. If only the
    versions differ, the cache is reused with a warning, so that a run continues with the same data; with `renew` it is
    not reused. A cache of an earlier version that has no origin is reused with a note.
    """
    if origin is None:
        say(
            f"note: {path} is of an earlier version, which did not store the contents of the images: they may have "
            "changed"
        )
        return True
    try:
        if origin == now:
            return True
        if origin.get("contents") != now.get("contents"):
            reason = f"images behind {path} have other contents under the same names, sizes and times"
        else:
            made = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())[:200]
            here = ", ".join(f"{name} {version}" for name, version in now["versions"].items())
            reason = f"{path} was made with {made}, not {here}"
            if not renew:
                say(
                    f"warning: {reason}, which may decode images a little differently; it is used as it is (remove it "
                    f"to compute the {what} again)"
                )
                return True
    except (KeyError, TypeError, AttributeError, RuntimeError):
        reason = f"{path} is damaged"
    say(f"warning: {reason}; the {what} are computed again")
    return False


def cached(
    path: str | Path,
    header: dict,
    compute: Callable,
    say: Callable,
    what: str,
    origin: Callable,
    check: Callable,
    renew: bool = False,
) -> Any:
    """Read the tensors of this header from `path`, or call compute() and store its result there.

    what: the name of the tensors in messages ("codes"). origin: a function that returns their origin; renew: see
    is_current. check: called with tensors that were read; raises DamagedFile if compute() cannot have returned them.
    The main process reads the file and decides whether to compute. If so, all processes call compute(), and the main
    process stores the result. The result is None in the other processes.
    """
    tensors: Any = None
    if distributed.is_main():
        now = origin()
        try:
            found = read(path, header)
            if found:
                check(found[0])
                if is_current(found[1], now, path, say, what, renew):
                    tensors = found[0]
        except (DamagedFile, OSError) as error:
            say(f"warning: {error}; the {what} are computed again")
    missing = distributed.from_main(lambda: tensors is None)
    if missing:
        if distributed.is_main():
            remove_temporaries(Path(path).parent, unused_for=ABANDONED)
        tensors = compute()
    if not distributed.is_main():
        return None
    if missing:
        store(path, header, tensors, say, what, now)
    else:
        say(f"{what} read from {path}")
    return tensors
