"""Counts the parameters and floating-point operations of a model for --dry_run. No operation is computed."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.core.progress import say


class FlopCounter(TorchDispatchMode):
    """Sums up the FLOPs of all operations by PyTorch's formulas. (PyTorch's own FlopCounterMode also looks for the
    module of each operation. FlopCounterMode therefore fails for gradients with respect to a weight, and for modules
    that return a view of a weight.)
    """

    def __init__(self):
        from torch.utils.flop_counter import flop_registry  # imported here, so that training does not wait

        super().__init__()
        self.formulas, self.total = flop_registry, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.formulas:
            self.total += self.formulas[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(function, *inputs):
    """Return the FLOPs of function(*inputs). A multiply-add counts as 2."""
    with FlopCounter() as counter:
        function(*inputs)
    return counter.total


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def summary(name, model, about, flops):
    """Return text with the number of parameters of the model and of its parts, and with the line `flops`."""
    lines = [f"{name}: {count_parameters(model):,} parameters; {about}"]
    for part, module in model.named_modules():
        count = count_parameters(module)
        if part and count and part.count(".") < 2 and not part.rsplit(".", 1)[-1].isdigit():
            lines.append(f"  {part:<28}{count:>14,}")
    return "\n".join([*lines, f"  {flops}"])


@torch.no_grad()
def describe_stage_1(H, ae, vqgan=None):
    """Return a summary of stage 1 as text. ae: models.autoencoder.VQAutoEncoder on the meta device; vqgan: the VQGAN
    that holds `ae`, or None if there is no discriminator."""
    h, w = H.latent_shape[1:]
    x = torch.empty(1, H.n_channels, H.img_size, H.img_size, device="meta")
    z = torch.empty(1, H.emb_dim, h, w, device="meta")
    parts = dict(encoder=(ae.encoder, x), generator=(ae.generator, z))
    if vqgan is not None:
        parts["discriminator"] = (vqgan.disc, x)
    flops = ", ".join(f"{name} {count_flops(*part) / 1e9:.3g}" for name, part in parts.items())
    return summary(
        "autoencoder" if vqgan is None else "VQGAN",
        ae if vqgan is None else vqgan,
        f"{H.img_size} x {H.img_size} pixels -> {h} x {w} codes of {H.codebook_size}",
        f"forward, GFLOPs an image: {flops}",
    )


@torch.no_grad()
def describe_sampler(H, sampler):
    """Return a summary of stage 2 as text. sampler: models.samplers.Sampler on the meta device."""
    flops = count_flops(sampler.net, torch.empty(1, H.block_size, dtype=torch.int64, device="meta"))
    about = f"{H.block_size} codes of {H.codebook_size}"
    return summary(H.sampler, sampler, about, f"one network pass, GFLOPs an image: {flops / 1e9:.3g}")


def print_dry_run(H, description):
    """Print the resolved configuration and the model's description. Values other than defaults have their source."""
    for name, value in H.to_dict().items():
        mark = f"  ({H.sources[name]})" if H.sources[name] else ""
        say(f"{name}: {' '.join(map(str, value)) if isinstance(value, list) else value}{mark}")
    say(f"\n{description}")
