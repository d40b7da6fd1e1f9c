"""Reads and writes cache files of tensors. Each file records the inputs of its tensors. A file is reused only for equal
inputs.

A file holds {name: tensor}, a header, a hash of the tensors, and their origin. The header is a dict of JSON values with
everything that the tensors depend on. Images are represented in the header only by names, sizes and times. The origin
holds a sample of the images' contents and the versions of libraries. The origin is compared when the file is read. A
different header gives a different file name. A file that does not match its header is damaged.
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
ABANDONED = 3600.0  # seconds; no process still writes a temporary file that is older


def read(path: str | Path, header: dict) -> tuple[dict, Any] | None:
    """Return ({name: tensor}, origin) stored under this header, or None if the file does not exist. Files of earlier
    versions have no origin: for such a file the returned origin is None.

    Raises DamagedFile if the file does not hold tensors of this header.
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
    """Return whether the tensor holds `count` distinct int64 numbers, all from the range `positions`."""
    if numbers.dtype != torch.int64 or numbers.shape != (count,):
        return False
    return len(numbers.unique()) == count and bool(((numbers >= positions.start) & (numbers < positions.stop)).all())


def write(path: str | Path, header: dict, tensors: dict, origin: Any = None) -> None:
    """Store {name: tensor} under this header. An error leaves no incomplete file."""
    digest = hash_tensors(tensors)
    save_tensors(path, dict(format=FORMAT, header=header, tensors=tensors, sha256=digest, origin=origin))


def store(path: str | Path, header: dict, tensors: dict, say: Callable, what: str, origin: Any = None) -> bool:
    """Store the tensors like `write`. If the file cannot be written, only print a warning, because the caller still has
    the tensors. Returns True if the file was written."""
    try:
        write(path, header, tensors, origin)
    except OSError as error:
        say(f"warning: the {what} cannot be cached in {path} ({error.strerror}); the next run computes them again")
        return False
    say(f"{what} cached in {path}")
    return True


def versions(*libraries: str) -> dict[str, str]:
    """Return {library: version}. The libraries are named as in the package index."""
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def is_current(origin: Any, now: dict, path: str | Path, say: Callable, what: str, renew: bool = False) -> bool:
    """Return whether a cache may be reused. Prints one line if the origins differ or if the stored origin is unknown.

    origin: the origin that is stored in the cache. now: the origin that a new cache would have. Each origin is
    dict(versions={library: version}). If the cache is made from images, the origin also has `contents`, a digest of
    some images. If the contents differ, the cache is not reused. If only the versions differ, the cache is reused with
    a warning, so that a run continues with the same data. With `renew`, a cache with other versions is not reused. A
    cache of an earlier version has no origin, and is reused with a note.
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

    what: the name of the tensors in messages ("codes"). origin: a function that returns the origin of a new cache.
    renew: see is_current. check: a function that is called with the tensors of the file. check raises DamagedFile if
    compute() cannot have returned these tensors. The main process reads the file. If the tensors must be computed, all
    processes call compute(), and the main process stores the result. The other processes get None.
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
