"""Selects the device that PyTorch computes on."""

import torch

from utils.core import distributed
from utils.core.errors import UserError


def pick_device(name: str) -> torch.device:
    """Return the torch.device of a name: 'auto', 'cpu', 'cuda' or 'mps'. Raises UserError if the device is not
    available."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    if name == "mps" and not mps:
        raise UserError("--device mps: PyTorch finds no Apple GPU here; use --device cpu or auto")
    if name == "mps" and distributed.world_size() > 1:
        raise UserError("--device mps: an Apple GPU works for one process only; use --device cpu for several")
    if name == "cuda":
        if distributed.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"{distributed.local_size()} processes on a machine with {torch.cuda.device_count()} CUDA device(s): "
                "give torchrun one for each (--nproc_per_node), or --device cpu"
            )
        torch.cuda.set_device(distributed.local_rank())
        return torch.device("cuda", distributed.local_rank())
    return torch.device(name)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device. The program does not wait for the device (CUDA needs pinned memory for this)."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def device_name(device: torch.device) -> str:
    """Return the name of a CUDA device, or the type of any other device ('cpu', 'mps')."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
