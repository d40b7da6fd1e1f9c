"""Sets of images, and batches whose order is a function of (seed, step).

An image on its way: bytes (utils.sources) -> uint8 (C, H, W) (utils.decoding) -> float in [0, 1] on the
device (`to_float`).
"""

import atexit
import hashlib
import multiprocessing
import os
import signal
import weakref

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils import distributed
from utils.cache import versions
from utils.decoding import decode
from utils.errors import UserError
from utils.io import hash_json
from utils.seed import derive_seed, permutation
from utils.signals import StopRequest
from utils.sources import open_source

MAX_BROKEN_SHARE = 0.05
VALIDATION_SHARE = 0.05
MAX_NAMED = 100  # broken images that are named one by one
SKETCHED = 1000  # names that a sketch has in a digest of their own: manifests of earlier versions have no other
SAMPLED = 64  # images whose contents are compared, where a cache is read


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
        self.packed = None  # utils.packed.PackedImages, where there is a cache of decoded images
        self.broken = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()
        self._reported = set()
        self._known_to_all = 0  # how many broken images every process of the job knows of

    def __len__(self):
        return len(self.indices)

    def load(self, i):
        """Image i, uint8 (C, H, W); None where it cannot be decoded."""
        if self.packed is not None and (image := self.packed.read(i)) is not None:
            return image
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
            return None if self.broken[key] else self.load(key), key
        i, flip = key
        for offset in range(self.most_broken() + 1):
            j = (i + offset) % len(self)
            image = None if self.broken[j] else self.load(j)
            if image is not None:
                return (image.flip(-1) if flip else image), j
        raise UserError(self._too_many(i))

    def most_broken(self):
        """How many images may be broken."""
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
        if count > self.most_broken():
            raise UserError(self._too_many(found[0]))

    def share_broken(self):
        """Tell the other processes of the job which images are broken. Called by all of them."""
        if distributed.any_rank(int(np.count_nonzero(self.broken.numpy()) != self._known_to_all)):
            self.broken.copy_(distributed.all_reduce_sum(self.broken.int()) > 0)
            self._known_to_all = np.count_nonzero(self.broken.numpy())

    def check_all_broken(self, say):
        """check_broken, after what the processes have met together. Called by all of them."""
        self.share_broken()
        self.check_broken(say)

    def left_out(self, positions):
        """Which images of a range are broken: int64 (n,)."""
        return positions.start + self.broken[positions.start : positions.stop].nonzero().flatten()

    def leave_out(self, left_out, missing, path, say):
        """Name the images that a cache was made without, and mark them as broken. Called by all processes.

        left_out: int64 (n,), in the main process; None in the others, and for a cache of an earlier version, which
        does not say which of them are the `missing` ones.
        """
        if left_out is not None:
            self.broken[left_out] = True
        elif missing:
            say(f"note: {path} was made without {missing} of {len(self)} images, which could not be read or decoded; "
                "remove it to try again")  # fmt: skip
        self.check_all_broken(say)

    def identity(self):
        """What these images are, for the keys of caches."""
        return dict(
            source=self.source.identity(), indices=hashlib.sha256(self.indices.astype("<i8").tobytes()).hexdigest(),
            img_size=self.img_size, n_channels=self.n_channels, resize="short side, bilinear, centre crop",
        )  # fmt: skip

    def origin(self):
        """What else is compared where a cache is read: see utils.cache.is_current."""
        digest = hashlib.sha256()
        for i in evenly_spaced(min(SAMPLED, len(self)), len(self)):
            digest.update(hashlib.sha256(self.source.sample(self.indices[i])).digest())
        return dict(contents=digest.hexdigest(), versions=versions("Pillow"))

    def sketch(self):
        """Enough to notice that a set is another one, wherever it is: how many, and digests of their names."""

        def names(positions):
            return (os.path.basename(self.source.name(self.indices[i])) for i in positions)

        n = len(self)
        known = dict(count=n, names=hash_json(list(names(evenly_spaced(min(SKETCHED, n), n)))))
        if n > SKETCHED:
            digest = hashlib.sha256()
            for name in names(range(n)):
                digest.update(f"{name!a}\n".encode())
            known["all_names"] = digest.hexdigest()
        return known

    def evenly(self, n):
        """n of these images, spread evenly over them."""
        return ImageSet(self.source, self.indices[evenly_spaced(n, len(self))], self.img_size, self.n_channels)


def evenly_spaced(count, n):
    """`count` positions spread evenly over range(n), int64 (count,)."""
    return np.linspace(0, n, count, endpoint=False).astype(np.int64)


def split_sizes(n):
    """How many of n images train and validate: the last 5% validate, at least one."""
    n_val = max(round(n * VALIDATION_SHARE), 1)
    return n - n_val, n_val


def open_images(H, split):
    """The ImageSet of H.dataset's split ('train' or 'val').

    A set that brings validation images keeps to them. Otherwise the first 95% (sorted by path) train
    and the last 5% validate, but that all train when --steps_per_eval is 0.
    """
    own_validation = open_source(H.data_entry, "val", H.unique_images)
    if split == "val" and own_validation is not None:
        source, chosen = own_validation, slice(None)
    else:
        source, chosen = open_source(H.data_entry, "train", H.unique_images), slice(None)
        n_train = split_sizes(len(source))[0]
        if split == "val":
            chosen = slice(n_train, None)
        elif own_validation is None and H.steps_per_eval:
            chosen = slice(n_train)
    distributed.must_agree(source.enumeration, f"the list of images ({H.data_entry['origin']})")
    indices = np.arange(len(source))[chosen]
    if len(indices) == 0:
        raise UserError(
            f"{H.data_entry['origin']}: {len(source)} image(s) leave none for '{split}' when some train and others "
            "validate (--steps_per_eval): add images"
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


def local_batch(H):
    """How many of a batch a process holds at once in training."""
    return max(1, H.batch_size // (distributed.world_size() * H.accumulate_steps))


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


def one_pass(images, batch_size, num_workers, flip=False, positions=None, shared=False):
    """Every decodable image once, in order, the last partial batch included.

    positions: a range of them (default: all). Yields (uint8 (B, C, H, W), indices (B,)); broken images are left out.
    shared: this process's share, batch i going to process i % world_size; also the batches in which nothing was
    left, so that they can be counted.
    """
    positions = range(len(images)) if positions is None else positions
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    if shared:
        batches = batches[distributed.rank() :: distributed.world_size()]
    loader = DataLoader(
        images, batch_sampler=batches, num_workers=num_workers, collate_fn=_collate_good,
        pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals,
    )  # fmt: skip
    for x, indices in worker_errors_in_words(loader):
        if len(indices) or shared:
            yield (x.flip(-1) if flip and len(indices) else x), indices


def worker_errors_in_words(loader):
    """The loader's batches; what goes wrong in a worker comes as the UserError it was, without its traceback."""
    batches = None
    try:
        batches = iter(loader)
        if loader.num_workers:
            _WITH_WORKERS.add(batches)
        yield from batches
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
    except (RuntimeError, OSError, MemoryError) as error:
        if batches is None and isinstance(error, OSError):
            _MultiProcessingDataLoaderIter._shutdown = True  # else the unfinished one complains when it is collected
        elif "DataLoader worker" not in str(error):
            raise
        reason = (str(error).strip().splitlines() or [repr(error)])[-1]  # of a worker's traceback the last line
        raise UserError(
            f"a process that decodes images failed ({reason}); most likely memory, or the shared memory /dev/shm, is "
            "full: give fewer --num_workers, or --num_workers 0"
        ) from None
    finally:  # now: an error's traceback would keep the workers until some later garbage collection
        if batches is not None and loader.num_workers:
            batches._shutdown_workers()


def fixed_images(images, count):
    """Up to `count` images spread evenly over the set, uint8 (n, C, H, W): the same ones whenever pictures are
    drawn. Broken ones are replaced by the next."""
    spread = evenly_spaced(min(count, len(images)), len(images))
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
