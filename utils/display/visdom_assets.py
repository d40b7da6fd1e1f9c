"""Installs the third-party scripts, styles and fonts that visdom's page needs, without visdom's server.

visdom's package does not contain these files. Its server downloads them from several hosts at its first start and
accepts any answer. If one file is missing, the page stays empty. This module fetches the files as npm packages (from
one registry, which may be a mirror) and compares each with a known hash. Without npm it tries visdom's own download,
with time-outs, and checks the files before they are used. Standard library only.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from utils.core.errors import UserError

VERSION = "0.2.4"  # the version of visdom that needs these files
PATIENCE = 180  # seconds that npm may take for all packages (25 MB)
OWN_PATIENCE = 60  # seconds that visdom's own download may take
MARK = "version.built"  # visdom writes this file when all files exist

# {package: {path below static/: (path in the package, the first 32 digits of its sha256)}}
FILES: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_suffix(".json").read_text())


class _NotAvailable(Exception):
    """A source did not provide the files. The message gives the reason."""


def install(static: Path, say: Callable[[str], object]) -> None:
    """Make sure that visdom's folder `static` has all files. say: called with each message. Idempotent.

    Raises UserError if the files cannot be downloaded or written.
    """
    if _is_installed(static):
        return
    if not os.access(static, os.W_OK):
        raise UserError(
            f"the page's scripts are not in {static} yet, which cannot be written: start the dashboard once as "
            "a user who may write there"
        )
    say("the page's scripts are not there yet: fetching them (25 MB, once)")
    failures = []
    for fetch in (_from_npm, _from_visdom):
        with tempfile.TemporaryDirectory(prefix="page_", dir=static) as folder:
            try:
                fetch(Path(folder))
                return _move(Path(folder), static)
            except _NotAvailable as error:
                failures.append(str(error))
    raise UserError(
        f"the page's scripts are not available ({'; '.join(failures)}): no dashboard. Training needs none "
        "(--no_visdom): its curves are in logs/<log_dir>/stats.jsonl and its pictures in logs/<log_dir>/images"
    )


def paths() -> list[str]:
    """The paths of all files below static/."""
    return [path for files in FILES.values() for path in files]


def _is_installed(static: Path) -> bool:
    """Return whether visdom's folder `static` has the mark and all files that the page needs."""
    with contextlib.suppress(OSError):
        return (static / MARK).read_text().strip() == VERSION and not _missing(static)
    return False


def _missing(folder: Path) -> list[str]:
    """Return the sorted names of needed files that are missing in `folder`, are empty, or contain an error page."""
    return sorted(path for path in paths() if not _looks_right(folder / path))


def _looks_right(path: Path) -> bool:
    try:
        with open(path, "rb") as f:
            start = f.read(64).lstrip()
    except OSError:
        return False
    return bool(start) and (path.suffix not in (".js", ".css") or not start.startswith(b"<"))


def _from_npm(folder: Path) -> None:
    """Fetch the packages with npm and unpack the needed files into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise _NotAvailable("there is no npm")
    packed = folder / "packed"
    packed.mkdir()
    words = [npm, "pack", "--loglevel", "error", "--ignore-scripts", "--fetch-retries", "0", *FILES]
    _run(words, "npm", PATIENCE, packed)
    for package, files in FILES.items():
        archive = packed / f"{package.replace('@', '-')}.tgz"
        try:
            with tarfile.open(archive) as tar:
                for path, (inside, digest) in files.items():
                    data = tar.extractfile(f"package/{inside}").read()  # type: ignore[union-attr]
                    if hashlib.sha256(data).hexdigest()[:32] != digest:
                        raise _NotAvailable(f"{inside} of {package} does not have the known hash")
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(data)
        except (OSError, KeyError, AttributeError, tarfile.TarError) as error:
            raise _NotAvailable(f"npm's {archive.name} is no such package ({error})") from None


def _from_visdom(folder: Path) -> None:
    """Let visdom download the files into `folder`, as its server does."""
    code = (
        "import sys, socket; socket.setdefaulttimeout(10); sys.modules['torch'] = None\n"  # torch would take seconds
        "from visdom.server.build import download_scripts; download_scripts(install_dir=sys.argv[1])"
    )
    _run([sys.executable, "-c", code, str(folder)], "visdom's download", OWN_PATIENCE, folder)
    for part in (folder / "static").glob("*"):
        part.rename(folder / part.name)
    if names := _missing(folder):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise _NotAvailable(f"visdom's download lacks {names[0]}{more}")


def _run(words: list[str], name: str, patience: float, cwd: Path) -> None:
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, timeout=patience, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise _NotAvailable(f"{name} took more than {patience} s") from None
    except OSError as error:
        raise _NotAvailable(f"{name} cannot be run: {error.strerror}") from None
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split()) or "it gave no reason"
        raise _NotAvailable(f"{name}: {reason[:120]}")


def _move(folder: Path, static: Path) -> None:
    """Move the files, and then the mark. Each file is complete or absent."""
    for path in paths():
        (static / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / path, static / path)
    (folder / MARK).write_text(VERSION)
    os.replace(folder / MARK, static / MARK)
