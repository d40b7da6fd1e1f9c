"""torch.compile for parts of a network: where it pays, and a way back where it does not work."""

import torch

OPTIONS = {}  # of torch.compile
MANY_STEPS = 1000  # of training: what compiling them saves is more than it takes
MANY_SAMPLES = 1000


def pays(choice, device, much=True):
    """Whether to compile: --compile 'on' or 'off', or 'auto': on CUDA devices that Triton supports, if there is much
    to do (compiling takes a minute or so)."""
    if choice != "auto":
        return choice == "on"
    return much and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def compile_parts(choice, parts):
    """Compile modules (calls of them, not of their methods) and bound methods in place, each when it is first
    called; names in state dicts stay. With 'auto' a part that cannot be compiled runs as it is, and PyTorch warns."""
    import torch._dynamo  # here: importing it takes seconds

    torch._dynamo.config.suppress_errors = choice == "auto"
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.compile(**OPTIONS)
        else:
            setattr(part.__self__, part.__name__, torch.compile(part, **OPTIONS))


def compile_model(model, choice, device, much=True):
    """Compile what a model calls its large parts, where that pays."""
    if pays(choice, device, much):
        compile_parts(choice, model.parts_to_compile())
