"""Compiles parts of a network with torch.compile, if compiling saves time."""

from collections.abc import Iterable
from typing import Any

import torch

OPTIONS: dict[str, Any] = {}  # further arguments of torch.compile
MANY_STEPS = 1000  # from this number of training steps on, compiling saves more time than it takes
MANY_SAMPLES = 1000  # from this number of samples on, compiling saves more time than it takes


def pays(choice: str, device: torch.device, much: bool = True) -> bool:
    """Return whether compiling saves time. choice: the value of --compile. 'auto' compiles only on CUDA devices that
    Triton supports, and only if there is much work. (Compiling takes about a minute.)"""
    if choice != "auto":
        return choice == "on"
    return much and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def compile_parts(choice: str, parts: Iterable[Any]) -> None:
    """Compile modules (their calls, not their methods) and bound methods in place, each at its first call. Names in
    state dicts stay the same. With 'auto', a part that cannot be compiled runs uncompiled, and PyTorch warns."""
    import torch._dynamo  # imported here, because the import takes seconds

    torch._dynamo.config.suppress_errors = choice == "auto"
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.compile(**OPTIONS)
        else:
            setattr(part.__self__, part.__name__, torch.compile(part, **OPTIONS))


def compile_model(model: Any, choice: str, device: torch.device, much: bool = True) -> None:
    """Compile the model's parts_to_compile(), if this saves time."""
    if pays(choice, device, much):
        compile_parts(choice, model.parts_to_compile())
