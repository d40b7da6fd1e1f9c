"""Makes batches of images and of codes, and manages the processes that decode images. The order of the data is a
function of (seed, step)."""

import atexit
import functools
import itertools
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.core import distributed
from utils.core.errors import UserError
from utils.core.progress import say
from utils.core.seed import derive_seed, permutation
from utils.core.signals import StopRequest
from utils.data.decoding import Crop
from utils.data.images import ImageSet, Say

Batch = tuple[torch.Tensor, torch.Tensor]  # (images uint8 (B, C, H, W), positions of the images in the set (B,))

# ---------------------------------------------------------------------- order


def batch_positions(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Return the positions of the items in the global batch of a step, int64 (batch_size,) in [0, n).

    The items of all epochs form an endless stream. Item p of the stream belongs to epoch p // n. Each epoch has an
    order of its own. Step 1 takes the first batch_size items. To resume at any step, a run needs only (seed, step).
    """
    stream = np.arange((step - 1) * batch_size, step * batch_size)
    epochs, offsets = stream // n, stream % n
    result = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = _order(seed, int(epoch), n)[offsets[here]]
    return result


_order = functools.lru_cache(maxsize=2)(permutation)


def local_rows(batch_size: int) -> slice:
    """Return the slice of a global batch that belongs to this process."""
    world = distributed.world_size()
    if batch_size % world:
        raise UserError(f"--batch_size {batch_size} (of all processes together) is not divisible by {world} processes")
    own = batch_size // world
    return slice(distributed.rank() * own, (distributed.rank() + 1) * own)


def local_batch(H: Any) -> int:
    """Return the number of images that a process computes at once in training."""
    return max(1, H.batch_size // (distributed.world_size() * H.accumulate_steps))


def _items(H: Any, n: int, start_step: int) -> Iterator[list[tuple[int, bool, Crop | None]]]:
    """Yield the items (index, flip, crop) of this process's share of each step from start_step on."""
    rows = local_rows(H.batch_size)
    for step in itertools.count(start_step):
        indices = batch_positions(H.seed, step, H.batch_size, n)
        flips = np.zeros(H.batch_size, dtype=bool)
        if H.horizontal_flip:
            flips = np.random.default_rng(derive_seed("flip", H.seed, step)).random(H.batch_size) < 0.5
        crops: list[Crop | None] = [None] * H.batch_size
        if H.random_crop < 1:
            crops = [Crop(H.random_crop, derive_seed("crop", H.seed, step, row)) for row in range(H.batch_size)]
        yield list(zip(indices[rows].tolist(), flips[rows].tolist(), crops[rows], strict=True))


# ---------------------------------------------------------------------- batches


def training_batches(images: ImageSet, H: Any, start_step: int, say: Say = say) -> Iterator[Batch]:
    """Yield the endless batches of this process from start_step on. All processes iterate together.

    Broken images are reported. Every --steps_per_log steps all processes exchange the positions of their broken images.
    Raises UserError if too many images are broken.
    """
    batches = _load(images, _items(H, len(images), start_step), H.num_workers, say)
    for step, batch in enumerate(batches, start_step):
        if step % H.steps_per_log == 0 or step == H.train_steps:
            images.check_all_broken(say)
        else:
            images.check_broken(say)
        yield batch


def code_batches(ids: torch.Tensor, H: Any, start_step: int) -> Iterator[torch.Tensor]:
    """Yield the endless batches of this process's rows of ids (N, L), from start_step on."""
    rows = local_rows(H.batch_size)
    for step in itertools.count(start_step):
        yield ids[batch_positions(H.seed, step, H.batch_size, len(ids))[rows]]


def one_pass(
    images: ImageSet,
    batch_size: int,
    num_workers: int,
    flip: bool = False,
    positions: range | None = None,
    shared: bool = False,
    say: Say = say,
) -> Iterator[Batch]:
    """Yield batches with every decodable image once, in order. The last batch may be smaller. Broken images are
    reported. Raises UserError if too many images are broken.

    positions: a range of positions (default: all).
    shared: yield only the share of this process. Batch i belongs to process i % world_size. All processes get the same
    number of batches, and some batches may be empty. At the end, all processes know all broken images.
    """
    positions = range(len(images)) if positions is None else positions
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    if shared:
        world = distributed.world_size()
        batches += [range(0)] * (-len(batches) % world)
        batches = batches[distributed.rank() :: world]
    for x, indices in _load(images, batches, num_workers, say, _collate_good):
        images.check_broken(say)
        if len(indices) or shared:
            yield (x.flip(-1) if flip and len(indices) else x), indices
    if shared:
        images.check_all_broken(say)


def _collate_good(items: list[tuple[torch.Tensor | None, int]]) -> Batch:
    good = [(image, i) for image, i in items if image is not None]
    x = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return x, torch.tensor([i for _, i in good], dtype=torch.int64)


# ---------------------------------------------------------------------- processes


def _load(
    images: ImageSet,
    batches: Iterable[Any],
    num_workers: int,
    say: Say,
    collate_fn: Callable[..., Batch] | None = None,
) -> Iterator[Batch]:
    """Yield the loaded batches of items. An error in a worker is raised as a UserError without the worker's
    traceback."""
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )
    loading = None
    try:
        loading = iter(loader)
        if num_workers:
            _WITH_WORKERS.add(loading)
        yield from loading
    except UserError as error:
        images.check_broken(say)  # if broken images caused the error, this call names them
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
    except (RuntimeError, OSError, MemoryError) as error:
        if loading is None and isinstance(error, OSError):
            # Otherwise the incomplete iterator raises an error when it is deleted.
            _MultiProcessingDataLoaderIter._shutdown = True
        elif "DataLoader worker" not in str(error):
            raise
        reason = (str(error).strip().splitlines() or [repr(error)])[-1]  # the last line of a worker's traceback
        raise UserError(
            f"a process that decodes images failed ({reason}); most likely memory, or the shared memory /dev/shm, is "
            "full: give fewer --num_workers, or --num_workers 0"
        ) from None
    finally:  # end the workers now, because the traceback of an error would keep them alive
        if loading is not None and num_workers:
            loading._shutdown_workers()  # type: ignore[attr-defined]


def ignore_signals(_worker: int) -> None:
    """Make a worker ignore signals. Only the parent process handles a signal to the process group (see end_workers)."""
    for name in StopRequest.SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


_WITH_WORKERS: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def end_workers() -> None:
    """At exit, ask the remaining workers to end, and then kill the workers that still run. Workers can remain because
    the traceback of an error keeps batches and their workers alive. A worker can hang in a read, or in a lock that a
    thread of its parent held at the fork.

    Without this function, multiprocessing would send SIGTERM, which workers ignore, and would then wait forever.
    """
    for batches in list(_WITH_WORKERS):
        batches._shutdown_workers()
    for child in multiprocessing.active_children():
        if child.daemon:  # multiprocessing would send SIGTERM, which workers ignore
            child.kill()
