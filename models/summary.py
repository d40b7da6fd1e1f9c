"""A model's parameters and floating-point operations, for --dry_run, without computing anything."""

import torch

from utils.core.progress import say


def count_flops(function, *shapes_and_types):
    """FLOPs (2 per multiply-add) of function(*inputs) on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # here, so that training does not wait for the import

    inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes_and_types]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops()


def parameter_lines(model, depth=2):
    """One line per submodule, down to `depth`: its name and number of parameters."""
    lines = []
    for name, module in model.named_modules():
        count = sum(p.numel() for p in module.parameters())
        if name and count and name.count(".") < depth and not name.rsplit(".", 1)[-1].isdigit():
            lines.append(f"  {name:<28}{count:>14,}")
    return lines


def describe_autoencoder(H, ae):
    """Summary of stage 1 without its discriminator as text. ae: models.autoencoder.VQAutoEncoder on the meta device."""
    return _describe_stage_1(H, "autoencoder", ae, ae, "")


def describe_vqgan(H, vqgan):
    """Summary of stage 1 as text. vqgan: models.vqgan.VQGAN on the meta device."""
    disc = count_flops(vqgan.disc, ((1, H.n_channels, H.img_size, H.img_size), torch.float32))
    return _describe_stage_1(H, "VQGAN", vqgan, vqgan.ae, f", discriminator {disc / 1e9:.3g}")


def _describe_stage_1(H, name, model, ae, more_flops):
    image = ((1, H.n_channels, H.img_size, H.img_size), torch.float32)
    z = ((1, H.emb_dim, *H.latent_shape[1:]), torch.float32)
    encode = count_flops(ae.encoder, image)
    decode = count_flops(ae.generator, z)
    codes = " x ".join(map(str, H.latent_shape[1:]))
    return "\n".join(
        [
            f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters; "
            f"{H.img_size} x {H.img_size} pixels -> {codes} codes of {H.codebook_size}",
            *parameter_lines(model),
            f"  forward, GFLOPs an image: encoder {encode / 1e9:.3g}, generator {decode / 1e9:.3g}{more_flops}",
        ]
    )


def describe_sampler(H, sampler):
    """Summary of stage 2 as text. sampler: models.samplers.Sampler on the meta device."""
    net = sampler.net
    flops = count_flops(net, ((1, H.block_size), torch.int64))
    return "\n".join(
        [
            f"{H.sampler}: {sum(p.numel() for p in sampler.parameters()):,} parameters; {H.block_size} codes of "
            f"{H.codebook_size}",
            *parameter_lines(sampler),
            f"  one network pass, GFLOPs an image: {flops / 1e9:.3g}",
        ]
    )


def print_dry_run(H, description):
    """The resolved configuration, each value with its source unless it is the default; then the model's description."""
    for name, value in H.to_dict().items():
        mark = f"  ({H.sources[name]})" if H.sources[name] else ""
        say(f"{name}: {' '.join(map(str, value)) if isinstance(value, list) else value}{mark}")
    say(f"\n{description}")


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())
