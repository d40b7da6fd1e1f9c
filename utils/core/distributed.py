"""Communication between the processes of one job under torchrun. With one process, nothing is sent.

Every process must call these functions in the same order. If one process ends or calls another function, all processes
end with an error. The first call joins the group. CPU tensors are sent by gloo, CUDA tensors by NCCL. Plain objects and
decisions are sent by gloo, so that nothing waits for a GPU.
"""

import datetime
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.core.errors import UserError
from utils.core.files import hash_json
from utils.core.job import is_main, local_rank, local_size, rank, world_size  # noqa: F401 (offered here, too)

# One process may work alone (hashing a checkpoint, k-means) while the other processes wait. PATIENCE is the longest
# wait. The death of a process is noticed earlier, by closed connections and by torchrun.
PATIENCE = datetime.timedelta(hours=1)


def join_group() -> bool:
    """Join the group of processes if the job has more than one process and has not joined yet. Returns True if the job
    has more than one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # a fast job.world_size(): each update runs this line often
        return False
    if not dist.is_initialized():
        store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
        # After a restart, torchrun's store can still hold the addresses of the previous processes.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=PATIENCE)
    return True


def cleanup() -> None:
    """Leave the group. Call it after all work that uses the group has succeeded."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------- tensors


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by its sum over the processes, and return it."""
    if join_group():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by its mean over the processes, and return it."""
    if join_group():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


class _Sum(torch.autograd.Function):
    """Differentiable sum over the processes. The losses of all processes depend on this sum."""

    @staticmethod
    def forward(_ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient.clone())


def mean_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of `tensor` over the processes. The gradient that reaches `tensor` is that of the sum of all
    processes' losses. After average_gradients(), the parameters have the gradients of the mean loss."""
    return _Sum.apply(tensor) / world_size() if join_group() else tensor


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace each gradient by its mean over the processes, in one flat message per type."""
    if not join_group():
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = all_reduce_mean(torch.cat([g.flatten() for g in grads]))
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensors (n, ...) of all processes, ordered by rank."""
    if not join_group():
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def broadcast_in_place(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite these tensors with the tensors of the main process."""
    if join_group():
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)


def broadcast_tensor(tensor: Any) -> torch.Tensor:
    """Return the CPU tensor of the main process in every process. The arguments of the other processes are ignored."""
    if not join_group():
        return tensor
    shape, dtype = from_main(lambda: (tensor.shape, tensor.dtype))
    if not is_main():
        tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        # Send bytes, because gloo does not support all types.
        dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), 0)
    return tensor


# ---------------------------------------------------------------------- decisions


def all_reduce_max(number: int) -> int:
    """Return the largest integer of all processes. Training calls this function to share a signal with all
    processes."""
    if not join_group():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def barrier() -> None:
    all_reduce_max(0)


def from_main(function: Callable) -> Any:
    """Call function() in the main process only. Returns the result (a plain object) in every process."""
    if not join_group():
        return function()
    box = [function() if is_main() else None]
    dist.broadcast_object_list(box, 0)
    return box[0]


def from_all(value: Any) -> list:
    """Return a list of the values of all processes, ordered by rank. Values are plain objects or CPU tensors."""
    if not join_group():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def must_agree(value: Callable, what: str) -> None:
    """Raise UserError if the JSON value that value() returns is not equal in all processes. what: the name of the value
    in the message."""
    if not join_group():
        return
    digests = from_all(hash_json(value()))
    others = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"{what} must be the same in all processes of a job, but it differs from that of rank 0 in rank "
            f"{', '.join(others)}. Give every machine the same flags and the same files under the same names (a shared "
            "file system)"
        )


# ---------------------------------------------------------------------- work that is shared out

_END = object()


def in_order(own: Iterable) -> Iterator:
    """Yield the results of shared work in order in the main process. The other processes get nothing, but must also
    iterate to the end, because iterating does their work.

    own: an iterable over the results of this process (CPU tensors or plain values). Process i % world_size makes result
    i. A result that is None is left out.
    """
    own = iter(own)
    while True:
        result = next(own, _END)
        if not all_reduce_max(int(result is not _END)):
            return
        mine = None if result is _END else result
        results: list | None = [mine]
        if join_group():
            results = [None] * world_size() if is_main() else None
            dist.gather_object(mine, results)
        yield from (r for r in results or () if r is not None)


def turns(first: int, n: int, size: int) -> Iterator[tuple[range, int]]:
    """Share range(first, first + n) evenly among the processes. The work is done in turns. In each turn, each process
    gets at most `size` items. Yields (range of this process, number of items of all processes) for each turn."""
    size = min(size, math.ceil(n / world_size()))
    for start in range(first, first + n, size * world_size()):
        stop = min(start + size * world_size(), first + n)
        own = range(start + size * rank(), min(start + size * (rank() + 1), stop))
        if own:
            yield own, stop - start
