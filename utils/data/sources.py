"""Reads encoded images from folders and LMDBs. The sources return bytes, not pixels."""

import bisect
import errno
import functools
import hashlib
import itertools
import os
import stat
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from utils.core.errors import UsageError, UserError
from utils.core.files import hash_json
from utils.core.job import from_root
from utils.core.json_files import without_waiting

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LARGEST_FILE = 1 << 30  # the most bytes of an encoded image
END = 1 << 16  # the digest of an image's contents covers this number of bytes at each end of the file
MOST_TYPES = 5  # the most types of unread files that a message lists
LMDB_SLACK = 1 << 20  # bytes by which a complete LMDB file may be shorter than its page count

# Temporary errors of a disk, a network or this machine, which do not mean that the file is damaged.
_DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
_MACHINE = (errno.EAGAIN, errno.ENOMEM, errno.ENFILE, errno.EMFILE)
PASSING = _DISK + _MACHINE
PAUSES = (0.1, 1.0, 5.0)  # seconds to wait after each failed attempt

T = TypeVar("T")

# ---------------------------------------------------------------------- reading


def is_passing(error: Exception) -> bool:
    """Return whether an exception is an error of PASSING. (LMDB's exceptions hold only the system's message.)"""
    if isinstance(error, OSError):
        return error.errno in PASSING
    return type(error).__module__ == "lmdb" and str(error).endswith(tuple(map(os.strerror, PASSING)))


def patiently(read: Callable[[], T], path: Any) -> T:
    """Call read(). If it raises an error of PASSING, call it again after a pause. After the last attempt, raise a
    UserError that names the file. A run must then stop, because otherwise a good image would be missing."""
    for number in range(len(PAUSES) + 1):
        try:
            return read()
        except Exception as error:
            if not is_passing(error):
                raise
            failure = error
        if number < len(PAUSES):
            time.sleep(PAUSES[number])
    path, reason = getattr(failure, "filename", None) or path, getattr(failure, "strerror", None) or failure
    raise UserError(
        f"{os.fsdecode(path)!r} cannot be read ({reason}; tried {len(PAUSES) + 1} times). The file may be good: check "
        "the disk or the network, then run the command again"
    )


def stat_file(path: Any) -> os.stat_result:
    return patiently(lambda: os.stat(path), path)


def read_file(path: Any) -> bytes:
    """Return the bytes of a file. Raises OSError if the file is larger than LARGEST_FILE, or if the path is not a
    regular file. (Reading from a pipe would block.)"""
    return patiently(lambda: _read_file(path), path)


def _read_file(path: Any, ends_only: bool = False) -> bytes:
    with open(path, "rb", opener=without_waiting) as f:
        status = os.fstat(f.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", path)
        if status.st_size > LARGEST_FILE:
            raise OSError(errno.EFBIG, "too large for an image", path)
        if not ends_only:
            return f.read()
        first = f.read(END)
        f.seek(max(END, status.st_size - END))
        return first + f.read(END)


class ByteStrings:
    """A list of byte strings in two flat buffers.

    Millions of Python objects would take three times the memory. Every worker would also need a copy, because reference
    counting writes to the memory pages that a forked process shares with its parent.
    """

    def __init__(self, items: Iterable[bytes]) -> None:
        self.data, self.ends = bytearray(), array("q", [0])
        for item in items:
            self.data += item
            self.ends.append(len(self.data))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> bytes:
        return bytes(self.data[self.ends[i] : self.ends[i + 1]])

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in itertools.islice(self.ends, 1, None):
            yield bytes(self.data[start:end])
            start = end

    def digest(self) -> str:
        """Return a hex digest of all strings."""
        digest = hashlib.sha256(self.data)
        digest.update(self.ends)
        return digest.hexdigest()


# ---------------------------------------------------------------------- sources


class FolderImages:
    """The image files in some folders and their subfolders, sorted by path. unique: if several paths or links lead to
    one file, use only the first path. without: folders whose files are left out. The attribute `others` counts the
    files of other types by extension."""

    what = "folders of images"

    @staticmethod
    def holds(folder: Any) -> bool:
        """Return whether a folder is of this kind."""
        return True

    def __init__(self, folders: Iterable[Any], unique: bool = False, without: Iterable[Any] = ()) -> None:
        self.folders, self.others, real = [os.fsencode(folder) for folder in folders], Counter[str](), real_file()
        files = sorted({os.fsencode(f) for folder in folders for f in find_images(folder, self.others)})
        if left_out := {real(os.fsencode(f)) for folder in without for f in find_images(folder)}:
            files = [f for f in files if real(f) not in left_out]
        self.files = ByteStrings(first_of_each(files, real) if unique else files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> bytes:
        return read_file(self.files[i])

    def sample(self, i: int) -> bytes:
        """Return the first and the last bytes of image i, or b"" if the file cannot be read."""
        try:
            return patiently(lambda: _read_file(self.files[i], ends_only=True), self.files[i])
        except OSError:
            return b""

    def name(self, i: int) -> str:
        return os.fsdecode(self.files[i])

    def split_keys(self) -> Iterator[bytes]:
        """Yield a key for each image. The hash of the key decides whether the image is a validation image. The key is
        the path relative to the folder, with slashes. In folders after the first, the number of the folder is appended.
        The keys do not change if the data set is moved."""
        starts = [(os.path.join(folder, b""), b"\0%d" % n if n else b"") for n, folder in enumerate(self.folders)]
        for path in self.files:
            for start, number in starts:
                if path.startswith(start):
                    yield path[len(start) :].replace(os.fsencode(os.sep), b"/") + number
                    break

    def identity(self) -> str:
        """Return a hash of the names, sizes and times of all files. Keys of caches contain this hash."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            status = stat_file(self.files[i])
            digest.update(f"{from_root(self.name(i))!a} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def enumeration(self) -> str:
        """Return a digest of the names in order. The digest must be equal in all processes of a job."""
        return self.files.digest()


def first_of_each(paths: Iterable[Any], real: Callable[[Any], Any] = os.path.realpath) -> list[Any]:
    """Return the paths without duplicates. A path that leads to the same file as an earlier path is left out. real: a
    function that returns the real path of a path."""
    found: dict[Any, Any] = {}
    for path in paths:
        found.setdefault(real(path), path)
    return list(found.values())


def real_file() -> Callable[[bytes], bytes]:
    """Return a fast function like os.path.realpath. The function resolves each folder only once, which saves time for
    many files in few folders."""
    real_folder = functools.cache(os.path.realpath)

    def real(path: bytes) -> bytes:
        path = os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))
        return os.path.realpath(path) if os.path.islink(path) else path

    return real


def find_images(folder: Any, others: Counter[str] | None = None) -> list[str]:
    """Return the paths of the images in a folder and its subfolders. Links to folders are followed. Each real folder is
    read once. others: a Counter to which files of other types are added by extension."""
    found, counts = patiently(lambda: _walk(folder), folder)
    if others is not None:
        others.update(counts)
    return found


def _walk(folder: Any) -> tuple[list[str], Counter[str]]:
    """Return (paths of the images, counts of files of other types by extension)."""
    found, others, seen = [], Counter[str](), set()
    for root, dirs, names in os.walk(folder, followlinks=True, onerror=_raise_passing):
        dirs.sort()  # a fixed order: if two paths lead to one folder, every machine uses the same path
        real = os.path.realpath(root)
        if real in seen:
            dirs.clear()  # the folder was already read, for example because of a loop of links
            continue
        seen.add(real)
        for name in names:
            path = os.path.join(root, name)
            # On some file systems, macOS writes a file "._x.png" next to x.png. This file is not an image.
            if name.lower().endswith(EXTENSIONS) and not name.startswith("._"):
                if _is_file(path):
                    found.append(path)
            elif not name.startswith("."):
                others[os.path.splitext(name)[1].lower()] += 1
    return found, others


def _raise_passing(error: OSError) -> None:
    if is_passing(error):
        raise error


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        _raise_passing(error)
        return False


class LmdbImages:
    """The encoded images in LSUN's LMDBs, sorted by key. The arguments unique and without are those of FolderImages."""

    what = "LMDBs"

    @staticmethod
    def holds(folder: Any) -> bool:
        return os.path.isfile(os.path.join(folder, "data.mdb"))

    others: Counter[str] = Counter()

    def __init__(self, folders: Iterable[Any], unique: bool = False, without: Iterable[Any] = ()) -> None:
        left_out = set(map(os.path.realpath, without))
        self.paths = [str(p) for p in (first_of_each(folders) if unique else folders)]
        self.paths = [p for p in self.paths if os.path.realpath(p) not in left_out]
        self.starts: list[int] = []  # the number of the first image of each LMDB
        self.keys = ByteStrings(self._list_keys())

    def _list_keys(self) -> Iterator[bytes]:
        import lmdb

        count = 0
        for path in self.paths:
            self.starts.append(count)
            try:
                with open_lmdb(path).begin() as txn:
                    for key in txn.cursor().iternext(values=False):
                        yield key
                        count += 1
            except lmdb.Error as error:
                raise UserError(f"{path}: not a readable LMDB ({error})") from None

    def _place(self, i: int) -> tuple[str, bytes]:
        """Return (path, key) of image i."""
        return self.paths[bisect.bisect_right(self.starts, i) - 1], self.keys[i]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> bytes | None:
        path, key = self._place(i)

        def get() -> bytes | None:
            with open_lmdb(path).begin() as txn:
                return txn.get(key)

        return patiently(get, path)

    def sample(self, i: int) -> bytes:
        content = self.read(i) or b""
        return content[:END] + content[max(END, len(content) - END) :]

    def name(self, i: int) -> str:
        path, key = self._place(i)
        return f"{path}:{key.decode(errors='replace')}"

    def split_keys(self) -> Iterator[bytes]:
        """Yield keys like FolderImages.split_keys. Each key is the image's key in the LMDB. In LMDBs after the first,
        the number of the LMDB is appended."""
        sizes = [end - start for start, end in itertools.pairwise([*self.starts, len(self)])]
        numbers = (b"\0%d" % n if n else b"" for n, size in enumerate(sizes) for _ in range(size))
        return map(bytes.__add__, self.keys, numbers)

    def identity(self) -> str:
        stats = [stat_file(os.path.join(p, "data.mdb")) for p in self.paths]
        return hash_json([[from_root(p), s.st_size, s.st_mtime_ns] for p, s in zip(self.paths, stats, strict=True)])

    def enumeration(self) -> list[Any]:
        return [self.paths, self.starts, self.keys.digest()]


_OPEN_LMDBS: dict[tuple[int, str], Any] = {}


def open_lmdb(path: str) -> Any:
    """Return the environment of an LMDB, which is opened once in each process. A forked worker must not use the
    environment of its parent."""
    import lmdb

    key = os.getpid(), path
    if key not in _OPEN_LMDBS:
        env = lmdb.open(path, readonly=True, create=False, lock=False, readahead=False, meminit=False)
        # Reading past the end of the mapped file would kill the process without a message.
        expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        size = os.path.getsize(os.path.join(path, "data.mdb"))
        if size + LMDB_SLACK < expected:
            env.close()
            raise UserError(f"{path}: data.mdb is truncated ({size} of {expected} bytes): copy or unpack it again")
        _OPEN_LMDBS[key] = env
    return _OPEN_LMDBS[key]


# ---------------------------------------------------------------------- entries of datasets.yaml

# The first class whose holds(folder) is true reads the folder. To add a kind of storage, add a class to this tuple.
KINDS = (LmdbImages, FolderImages)
Source = LmdbImages | FolderImages


def open_source(entry: dict[str, Any], split: str, unique: bool = False) -> Source | None:
    """Return the images of a datasets.yaml entry for the split 'train', or the entry's own validation images for 'val'.
    unique: if several paths or links lead to one file or LMDB, use it once.

    Returns None for 'val' if the set has no validation images of its own. If no image is found, raises a UserError that
    names the place to edit. Images in 'val_paths' are not training images, even if these images are also in 'paths'.
    """
    paths, val_paths = _existing(entry, "paths"), _existing(entry, "val_paths")
    if split == "val" and val_paths:
        return _open_folders(entry, "val_paths", val_paths, unique)
    by_split = _of_category(entry, paths, split)
    if by_split:
        return LmdbImages(by_split, unique, val_paths)
    if split == "val":
        return None
    if "category" in entry and not any(LmdbImages.holds(path) for path in paths):
        pattern = f"{entry['category']}_{split}_lmdb"
        raise UserError(f"{entry['origin']}: no '{pattern}' with a data.mdb in {', '.join(paths)}: {_remedy(entry)}")
    return _open_folders(entry, "paths", paths, unique, val_paths)


def _existing(entry: dict[str, Any], key: str) -> list[str]:
    """Return the folders that an entry names under this key."""
    paths = [os.path.expanduser(p) for p in entry.get(key, ())]
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{entry['origin']}: the folder '{path}' does not exist: {_remedy(entry, key)}")
    return paths


def _of_category(entry: dict[str, Any], paths: Iterable[str], split: str) -> list[Path]:
    """Return LSUN's LMDBs of a split in these folders."""
    pattern = f"{entry.get('category', '*')}_{split}_lmdb"
    try:
        return [q for p in paths for q in sorted(Path(p).glob(pattern)) if LmdbImages.holds(q)]
    except (ValueError, NotImplementedError, RecursionError):  # a category can be an absolute path, "a**" or very long
        raise UsageError(
            f"{entry['origin']}: 'category' {entry['category'][:100]!r} must be what precedes '_{split}_lmdb' in the "
            "name of a folder in 'paths'"
        ) from None


def _open_folders(
    entry: dict[str, Any], key: str, paths: list[str], unique: bool, without: Iterable[str] = ()
) -> Source:
    """Return the source of the images in these folders. All folders must be of one kind. key: the field of the entry
    that lists the folders."""
    kinds = {next(kind for kind in KINDS if kind.holds(path)): path for path in reversed(paths)}
    if len(kinds) > 1:
        mixed = " and ".join(f"{kind.what} ({kinds[kind]})" for kind in KINDS if kind in kinds)
        raise UserError(f"{entry['origin']}: '{key}' mixes {mixed}: give one kind")
    (kind,) = kinds
    source = kind(paths, unique, without)
    if len(source) == 0:
        there = f", but {note}" if (note := other_files(source)) else ""
        extensions = " ".join(e[1:] for e in EXTENSIONS)
        raise UserError(
            f"{entry['origin']}: no images ({extensions}) under {', '.join(paths)}{there}: {_remedy(entry, key)}"
        )
    return source


def other_files(source: Source) -> str:
    """Return the numbers of files that are not read, by type, as text. Return "" if all files are read."""
    by_count = sorted(source.others.items(), key=lambda item: (-item[1], item[0]))
    counts = [f"{count} {extension or 'without extension'}" for extension, count in by_count]
    if len(counts) > MOST_TYPES:
        counts[MOST_TYPES:] = ["..."]
    total = source.others.total()
    return f"{total} file{'s' if total > 1 else ''} of other types ({', '.join(counts)})" if total else ""


def _remedy(entry: dict[str, Any], key: str = "paths") -> str:
    if entry["name"] == "custom":
        return "give the folder of your images with --custom_dataset_path"
    if entry["name"] == "demo":
        return "draw the images with `make demo`, or edit 'paths' there"
    return f"edit '{key}' of '{entry['name']}' in {entry.get('file', 'datasets.yaml')}"
