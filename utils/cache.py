"""Files of tensors that say what made them: nothing is reused for anything else.

Each holds {name: tensor}, a header (JSON values: everything that the tensors depend on) and their hash.
A header that differs means another file; a file that does not hold what its header says is damaged.
"""

from pathlib import Path

from utils import distributed
from utils.errors import DamagedFile
from utils.io import hash_tensors, load_tensors, remove_temporaries, save_tensors

FORMAT = 1
ABANDONED = 3600.0  # seconds: another process may be writing into the same folder, but not so slowly


def read(path, header):
    """The tensors {name: tensor} stored under this header, or None where there is no file.

    Raises DamagedFile for a file that does not hold them.
    """
    if not Path(path).exists():
        return None
    value = load_tensors(path)
    try:
        tensors, found, digest = value["tensors"], value["header"], value["sha256"]
        if value["format"] != FORMAT or found != header or hash_tensors(tensors) != digest:
            raise DamagedFile(f"{path} does not hold what its name says")
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise DamagedFile(f"{path} is damaged: not a cache file") from None
    return tensors


def write(path, header, tensors):
    """Store {name: tensor} under this header; complete or absent."""
    save_tensors(path, dict(format=FORMAT, header=header, tensors=tensors, sha256=hash_tensors(tensors)))


def store(path, header, tensors, say, what):
    """As write, but where that cannot be done only a warning is said: the tensors are there all the same.
    Returns whether it was done."""
    try:
        write(path, header, tensors)
    except OSError as error:
        say(f"warning: the {what} cannot be cached in {path} ({error.strerror}); the next run computes them again")
        return False
    say(f"{what} cached in {path}")
    return True


def cached(path, header, compute, say, what):
    """The tensors of this header from `path`, or from compute(), which are then stored there.

    what: their name in messages ("codes"). Of several processes the main one reads, and says whether there is
    anything to compute; then all do that, and it stores. Elsewhere the result is None.
    """
    tensors = None
    if distributed.is_main():
        try:
            tensors = read(path, header)
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
        store(path, header, tensors, say, what)
    else:
        say(f"{what} read from {path}")
    return tensors
