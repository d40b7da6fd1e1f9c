"""Images from folders and LMDBs, and batches whose order is a function of (seed, step).

An image on its way: file -> uint8 (C, H, W) here -> float in [0, 1] on the device (`to_float`).
"""

import atexit
import bisect
import hashlib
import io
import multiprocessing
import os
import signal
import warnings
import weakref
from array import array
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from utils import distributed
from utils.errors import UserError
from utils.io import hash_json
from utils.seed import derive_seed, permutation
from utils.signals import StopRequest

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Whatever a file is called, it is read as one of these: Pillow's other readers (EPS runs Ghostscript)
# are not for files from anywhere.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_BROKEN_SHARE = 0.05
VALIDATION_SHARE = 0.05
MAX_NAMED = 100  # broken images that are named one by one
LONG_IMAGE = 8  # aspect ratio from which an image is cropped before it is resized
LMDB_SLACK = 1 << 20  # bytes that a whole LMDB file may be shorter than its page count says


# ---------------------------------------------------------------------- sources


class Packed:
    """A list of byte strings in two flat buffers.

    Millions of Python objects would take three times the memory, and once in every worker: counting
    references writes to the pages that a forked process shares with its parent.
    """

    def __init__(self, items):
        self.data, self.ends = bytearray(), array("q", [0])
        for item in items:
            self.data += item
            self.ends.append(len(self.data))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return bytes(self.data[self.ends[i] : self.ends[i + 1]])


class FolderImages:
    """The image files under some folders, recursive, sorted by path."""

    def __init__(self, folders):
        self.files = Packed(sorted({os.fsencode(f) for folder in folders for f in find_images(folder)}))

    def __len__(self):
        return len(self.files)

    def read(self, i):
        with open(self.files[i], "rb") as f:
            return f.read()

    def name(self, i):
        return os.fsdecode(self.files[i])

    def identity(self):
        """What the images are, for the keys of caches: names, sizes and times of all files."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            stat = os.stat(self.files[i])
            digest.update(f"{self.name(i)!a} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def find_images(folder):
    """Paths of the images under a folder. Links to folders are followed, each real folder once."""
    seen = set()
    for root, dirs, names in os.walk(folder, followlinks=True):
        dirs.sort()  # of two ways to one folder, the same one is taken everywhere
        real = os.path.realpath(root)
        if real in seen:
            dirs.clear()  # a loop of links
            continue
        seen.add(real)
        for name in names:
            path = os.path.join(root, name)
            # "._x.png" is what macOS leaves beside x.png on foreign disks: not an image.
            if name.lower().endswith(EXTENSIONS) and not name.startswith("._") and os.path.isfile(path):
                yield path


class LmdbImages:
    """The encoded images in LSUN's LMDBs, sorted by key."""

    def __init__(self, paths):
        self.paths = [str(p) for p in paths]
        self.starts = []  # number of the first image of each LMDB
        self.keys = Packed(self._list_keys())

    def _list_keys(self):
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

    def _place(self, i):
        """(path, key) of image i."""
        return self.paths[bisect.bisect_right(self.starts, i) - 1], self.keys[i]

    def __len__(self):
        return len(self.keys)

    def read(self, i):
        path, key = self._place(i)
        with open_lmdb(path).begin() as txn:
            return txn.get(key)

    def name(self, i):
        path, key = self._place(i)
        return f"{path}:{key.decode(errors='replace')}"

    def identity(self):
        stats = [os.stat(os.path.join(p, "data.mdb")) for p in self.paths]
        return hash_json([[p, s.st_size, s.st_mtime_ns] for p, s in zip(self.paths, stats, strict=True)])


_OPEN_LMDBS = {}


def open_lmdb(path):
    """The environment of an LMDB, opened once in each process: a forked worker must not use its parent's."""
    import lmdb

    key = os.getpid(), path
    if key not in _OPEN_LMDBS:
        env = lmdb.open(path, readonly=True, create=False, lock=False, readahead=False, meminit=False)
        # Reading past the end of the mapped file would kill the process without a word.
        expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        size = os.path.getsize(os.path.join(path, "data.mdb"))
        if size + LMDB_SLACK < expected:
            env.close()
            raise UserError(f"{path}: data.mdb is truncated ({size} of {expected} bytes): copy or unpack it again")
        _OPEN_LMDBS[key] = env
    return _OPEN_LMDBS[key]


def is_lmdb(path):
    return os.path.isfile(os.path.join(path, "data.mdb"))


def open_source(entry, split):
    """The images of a datasets.yaml entry for 'train', or its own validation images for 'val'.

    Returns None for 'val' where the set brings none. Raises UserError, naming what to edit, where
    there is nothing to read.
    """
    paths = [os.path.expanduser(p) for p in entry["paths"]]
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{entry['origin']}: the folder '{path}' does not exist: {_remedy(entry)}")
    pattern = f"{entry.get('category', '*')}_{split}_lmdb"
    by_split = [q for p in paths for q in sorted(Path(p).glob(pattern)) if is_lmdb(q)]
    if by_split:
        return LmdbImages(by_split)
    if split == "val":
        return None
    lmdbs = [p for p in paths if is_lmdb(p)]
    if len(lmdbs) == len(paths):
        source = LmdbImages(paths)
    elif lmdbs:
        raise UserError(f"{entry['origin']}: 'paths' mixes LMDBs ({lmdbs[0]}) and other folders: give one kind")
    elif "category" in entry:
        raise UserError(f"{entry['origin']}: no '{pattern}' with a data.mdb in {', '.join(paths)}: {_remedy(entry)}")
    else:
        source = FolderImages(paths)
    if len(source) == 0:
        kinds = " ".join(e[1:] for e in EXTENSIONS)
        raise UserError(f"{entry['origin']}: no images ({kinds}) under {', '.join(paths)}: {_remedy(entry)}")
    return source


def _remedy(entry):
    if entry["name"] == "custom":
        return "give the folder of your images with --custom_dataset_path"
    if entry["name"] == "demo":
        return "draw the images with `make demo`, or edit 'paths' there"
    return f"edit 'paths' of '{entry['name']}' in datasets.yaml"


# ---------------------------------------------------------------------- images


def decode(data, size, n_channels=3):
    """Encoded bytes -> uint8 (C, size, size): short side resized to `size`, then the centre cut out.

    Any size and mode: transparency is put on white, 16-bit greys are scaled, EXIF rotation applied;
    of an animation the first frame. Raises some Exception for what is not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        image = to_rgb(upright(image))
    if n_channels == 1:
        image = image.convert("L")
    image = resize_and_crop(image, size)
    array = np.array(image, dtype=np.uint8).reshape(size, size, n_channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def upright(image):
    """The image as its EXIF data says it was taken; as it is where these cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever: the pixels are good
        return image


def to_rgb(image):
    """Any Pillow mode -> RGB."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(image, size):
    """Resize(size) and CenterCrop(size) of torchvision, pixel for pixel; of long strips to within rounding.

    In Pillow alone, which is what torchvision calls: importing it takes longer than all else at start.
    """
    w, h = image.size
    short = min(w, h)
    new_w, new_h = size * w // short, size * h // short
    left, top = round((new_w - size) / 2), round((new_h - size) / 2)
    if max(w, h) > LONG_IMAGE * short:
        # Resizing all of a 1 x 5000 strip only to cut a square out of it would fill the memory.
        box = (left * w / new_w, top * h / new_h, (left + size) * w / new_w, (top + size) * h / new_h)
        return image.resize((size, size), Image.BILINEAR, box=box)
    if (w, h) != (new_w, new_h):
        image = image.resize((new_w, new_h), Image.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def to_float(x):
    """uint8 -> float32 in [0, 1]."""
    return x.float() / 255


class ImageSet(Dataset):
    """Some images of a source, decoded to img_size; shared by all workers.

    Broken images are marked in `broken` (shared memory) by whichever process meets them; in training
    the next good image takes the place of a broken one, so that batches stay full.
    """

    def __init__(self, source, indices, img_size, n_channels=3):
        self.source, self.indices = source, np.asarray(indices)
        self.img_size, self.n_channels = img_size, n_channels
        self.broken = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()
        self._reported = set()

    def __len__(self):
        return len(self.indices)

    def load(self, i):
        """Image i, uint8 (C, H, W); None where it cannot be decoded."""
        try:
            return decode(self.source.read(self.indices[i]), self.img_size, self.n_channels)
        except UserError:
            raise  # the source itself cannot be read
        except Exception:  # Pillow's readers raise nearly everything, and one bad file must not end a run
            self.broken[i] = True
            return None

    def __getitem__(self, key):
        """key (i, flip) -> (image, i) with a replacement for a broken image; key i -> (image or None, i)."""
        if not isinstance(key, tuple):
            return self.load(key), key
        i, flip = key
        for offset in range(self._most_broken() + 1):
            j = (i + offset) % len(self)
            image = None if self.broken[j] else self.load(j)
            if image is not None:
                return (image.flip(-1) if flip else image), j
        raise UserError(self._too_many(i))

    def _most_broken(self):
        return int(MAX_BROKEN_SHARE * len(self))

    def _too_many(self, i):
        return (
            f"{int(self.broken.sum())} of {len(self)} images cannot be decoded, "
            f"{self.source.name(self.indices[i])!r} among them; more than 5% is more than an accident: "
            "remove or repair them"
        )

    def check_broken(self, say):
        """Name newly found broken images through `say`; UserError when there are more than 5%."""
        count = np.count_nonzero(self.broken.numpy())  # at every step: 0.2 ms for 3 million, torch's sum 4 ms
        if count == len(self._reported):
            return
        found = self.broken.nonzero().squeeze(1).tolist()
        for i in found:
            if i not in self._reported and len(self._reported) < MAX_NAMED:
                say(f"skipped: {self.source.name(self.indices[i])!r} cannot be decoded")
            self._reported.add(i)
        if count > self._most_broken():
            raise UserError(self._too_many(found[0]))

    def identity(self):
        """What these images are, for the keys of caches."""
        return dict(
            source=self.source.identity(), count=len(self), first=int(self.indices[0]), last=int(self.indices[-1]),
            img_size=self.img_size, n_channels=self.n_channels, resize="short side, bilinear, centre crop",
        )  # fmt: skip


def split_sizes(n):
    """How many of n images train and validate: the last 5% validate, at least one."""
    n_val = max(round(n * VALIDATION_SHARE), 1)
    return n - n_val, n_val


def open_images(H, split):
    """The ImageSet of H.dataset's split ('train' or 'val').

    A set that brings validation images keeps to them. Otherwise the first 95% (sorted by path) train
    and the last 5% validate, but that all train when --steps_per_eval is 0.
    """
    own_validation = open_source(H.data_entry, "val")
    if split == "val" and own_validation is not None:
        source, chosen = own_validation, slice(None)
    else:
        source, chosen = open_source(H.data_entry, "train"), slice(None)
        n_train = split_sizes(len(source))[0]
        if split == "val":
            chosen = slice(n_train, None)
        elif own_validation is None and H.steps_per_eval:
            chosen = slice(n_train)
    indices = np.arange(len(source))[chosen]
    if len(indices) == 0:
        raise UserError(
            f"{H.data_entry['origin']}: {len(source)} image(s) leave none for '{split}': add images, "
            "or train without validation (--steps_per_eval 0)"
        )
    return ImageSet(source, indices, H.img_size, H.n_channels)


# ---------------------------------------------------------------------- batches


def batch_positions(seed, step, batch_size, n):
    """Which items form the global batch of a step: int64 (batch_size,) in [0, n).

    Item p of the endless stream belongs to epoch p // n, which has an order of its own; step 1 takes
    the first batch_size of the stream. Nothing but (seed, step) is needed to go on anywhere.
    """
    stream = np.arange((step - 1) * batch_size, step * batch_size)
    epochs, offsets = stream // n, stream % n
    result = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = _order(seed, int(epoch), n)[offsets[here]]
    return result


_ORDERS = {}


def _order(seed, epoch, n):
    """permutation(seed, epoch, n), the last two kept."""
    key = (seed, epoch, n)
    if key not in _ORDERS:
        while len(_ORDERS) > 1:
            _ORDERS.pop(next(iter(_ORDERS)))
        _ORDERS[key] = permutation(seed, epoch, n)
    return _ORDERS[key]


def local_rows(batch_size):
    """The slice of a global batch that belongs to this process."""
    world = distributed.world_size()
    if batch_size % world:
        raise UserError(f"--batch_size {batch_size} (of all processes together) is not divisible by {world} processes")
    own = batch_size // world
    return slice(distributed.rank() * own, (distributed.rank() + 1) * own)


class StepBatches:
    """An endless batch sampler: (index, flip) pairs of this process's share of steps start, start+1, ..."""

    def __init__(self, n, batch_size, seed, start, flip):
        self.n, self.batch_size, self.seed, self.start, self.flip = n, batch_size, seed, start, flip
        self.rows = local_rows(batch_size)

    def __iter__(self):
        step = self.start
        while True:
            indices = batch_positions(self.seed, step, self.batch_size, self.n)
            flips = np.zeros(self.batch_size, dtype=bool)
            if self.flip:
                flips = np.random.default_rng(derive_seed("flip", self.seed, step)).random(self.batch_size) < 0.5
            yield list(zip(indices[self.rows].tolist(), flips[self.rows].tolist(), strict=True))
            step += 1


def training_batches(images, H, start_step):
    """Endless (uint8 (B, C, H, W), indices (B,)) of this process, from start_step on."""
    sampler = StepBatches(len(images), H.batch_size, H.seed, start_step, H.horizontal_flip)
    loader = DataLoader(
        images, batch_sampler=sampler, num_workers=H.num_workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )  # fmt: skip
    return worker_errors_in_words(loader)


def one_pass(images, batch_size, num_workers, flip=False):
    """Every decodable image once, in order, the last partial batch included.

    Yields (uint8 (B, C, H, W), indices (B,)); broken images are left out.
    """
    loader = DataLoader(
        images, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate_good,
        pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals,
    )  # fmt: skip
    for x, indices in worker_errors_in_words(loader):
        if len(indices):
            yield (x.flip(-1) if flip else x), indices


def worker_errors_in_words(loader):
    """The loader's batches; what goes wrong in a worker comes as the UserError it was, without its traceback."""
    batches = iter(loader)
    if loader.num_workers:
        _WITH_WORKERS.add(batches)
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that decodes images died ({' '.join(str(error).split())[:200]}); most likely memory, or the "
            "shared memory /dev/shm, is full: give fewer --num_workers, or --num_workers 0"
        ) from None
    finally:  # now: an error's traceback would keep the workers until some later garbage collection
        if loader.num_workers:
            batches._shutdown_workers()


def fixed_images(images, count):
    """Up to `count` images spread evenly over the set, uint8 (n, C, H, W): the same ones whenever pictures are
    drawn. Broken ones are replaced by the next."""
    spread = np.linspace(0, len(images), min(count, len(images)), endpoint=False).astype(int)
    return torch.stack([images[i, False][0] for i in spread.tolist()])


def _collate_good(items):
    good = [(image, i) for image, i in items if image is not None]
    x = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return x, torch.tensor([i for _, i in good], dtype=torch.int64)


def ignore_signals(_worker):
    """In a worker: a signal to the whole process group is the main process's to handle (see end_workers)."""
    for name in StopRequest.SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


_WITH_WORKERS = weakref.WeakSet()


@atexit.register
def end_workers():
    """Tell the workers that are left at exit to end, and make an end of those that do not. (An error's
    traceback keeps its batches alive; a worker can be stuck in a read, or in a lock that a thread of its
    parent held when it was forked.)

    Otherwise multiprocessing would send SIGTERM, which they ignore, and wait for them for ever.
    """
    for batches in list(_WITH_WORKERS):
        batches._shutdown_workers()
    for child in multiprocessing.active_children():
        if child.daemon:  # multiprocessing itself ends such processes, only not those that ignore SIGTERM
            child.kill()
