"""The processes of one job under torchrun. With one process every function is the identity."""

import os

import torch
import torch.distributed as dist


def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    """True on the one process that writes, logs and talks to the dashboard."""
    return rank() == 0


def setup(device):
    """Join the process group that torchrun describes (NCCL on CUDA, gloo elsewhere)."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor):
    """The sum of `tensor` over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor):
    """The mean of `tensor` over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def mean_with_gradient(tensor):
    """The mean of `tensor` over the processes. Gradients flow back to every process's tensor, as those of the
    sum of all processes' losses: averaging the parameters' gradients makes them the mean loss's."""
    if world_size() == 1:
        return tensor
    import torch.distributed.nn.functional as collectives

    return collectives.all_reduce(tensor) / world_size()


def average_gradients(parameters):
    """Replace each gradient by its mean over the processes, in one flat message per type."""
    if world_size() == 1:
        return
    by_dtype = {}
    for p in parameters:
        if p.grad is not None:
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = all_reduce_mean(torch.cat([g.flatten() for g in grads]))
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def all_gather_rows(tensor):
    """Concatenate `tensor` (n, ...) of all processes in the order of their ranks."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def any_rank(flag, device):
    """The largest of the processes' integers `flag`: how a signal to one reaches all."""
    if world_size() == 1:
        return flag
    value = torch.tensor(flag, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def barrier():
    if world_size() > 1:
        dist.barrier()
