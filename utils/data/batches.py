"""Batches of images, whose order is a function of (seed, step), and the processes that decode them."""

import atexit
import multiprocessing
import signal
import weakref

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.core import distributed
from utils.core.errors import UserError
from utils.core.seed import derive_seed, permutation
from utils.core.signals import StopRequest

# ---------------------------------------------------------------------- batches


def batch_positions(seed, step, batch_size, n):
    """Which items form the global batch of a step: int64 (batch_size,) in [0, n).

    Item p of the endless stream belongs to epoch p // n, and each epoch has an order of its own. Step 1 takes
    the first batch_size items of the stream. Only (seed, step) is needed to resume at any step.
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
    """permutation(seed, epoch, n), with a cache of the last two."""
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
    """The number of images of a batch that a process holds at once in training."""
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
    """Yield the endless batches (uint8 (B, C, H, W), indices (B,)) of this process, from start_step on."""
    sampler = StepBatches(len(images), H.batch_size, H.seed, start_step, H.horizontal_flip)
    loader = DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=H.num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )
    return worker_errors_in_words(loader)


def one_pass(images, batch_size, num_workers, flip=False, positions=None, shared=False):
    """Yield every decodable image once, in order, including the last partial batch.

    positions: a range of positions (default: all). Yields (uint8 (B, C, H, W), indices (B,)) without broken images.
    shared: yield only this process's share: batch i belongs to process i % world_size. Empty batches are then yielded
    too, so that the caller can count them.
    """
    positions = range(len(images)) if positions is None else positions
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    if shared:
        batches = batches[distributed.rank() :: distributed.world_size()]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate_good,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )
    for x, indices in worker_errors_in_words(loader):
        if len(indices) or shared:
            yield (x.flip(-1) if flip and len(indices) else x), indices


def worker_errors_in_words(loader):
    """Yield the loader's batches. An error in a worker is raised as a UserError without the worker's traceback."""
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
            _MultiProcessingDataLoaderIter._shutdown = True  # else the incomplete iterator raises when it is collected
        elif "DataLoader worker" not in str(error):
            raise
        reason = (str(error).strip().splitlines() or [repr(error)])[-1]  # the last line of a worker's traceback
        raise UserError(
            f"a process that decodes images failed ({reason}); most likely memory, or the shared memory /dev/shm, is "
            "full: give fewer --num_workers, or --num_workers 0"
        ) from None
    finally:  # end them now: an error's traceback would keep them until a later garbage collection
        if batches is not None and loader.num_workers:
            batches._shutdown_workers()


def _collate_good(items):
    good = [(image, i) for image, i in items if image is not None]
    x = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return x, torch.tensor([i for _, i in good], dtype=torch.int64)


def ignore_signals(_worker):
    """Called in a worker: the parent process handles a signal to the process group (see end_workers)."""
    for name in StopRequest.SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


_WITH_WORKERS = weakref.WeakSet()


@atexit.register
def end_workers():
    """At exit, ask the remaining workers to end, then kill those that do not. (An error's traceback keeps
    its batches alive. A worker can be stuck in a read, or in a lock that a thread of its parent held when it
    was forked.)

    Otherwise multiprocessing would send SIGTERM, which they ignore, and wait for them indefinitely.
    """
    for batches in list(_WITH_WORKERS):
        batches._shutdown_workers()
    for child in multiprocessing.active_children():
        if child.daemon:  # multiprocessing ends these with SIGTERM, which workers ignore
            child.kill()
