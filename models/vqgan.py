"""The module VQGAN holds all networks of stage 1. The names of its parameters are those of the published models."""

from torch import nn

from utils.core import distributed


class VQGAN(nn.Module):
    """Holds `ae` (VQAutoEncoder), `disc` (Discriminator) and `perceptual` (a frozen distance such as LPIPS, or None).

    The script train_vqgan.py computes the updates.
    """

    def __init__(self, ae, disc, perceptual=None):
        super().__init__()
        self.ae = ae
        self.disc = disc
        self.perceptual = perceptual
        if perceptual is not None:
            perceptual.requires_grad_(False)

    def parts_to_compile(self):
        """Return the networks to compile. The generator's last layer is not among the networks."""
        parts = [self.ae.encoder, self.ae.generator.features, self.perceptual]
        if distributed.world_size() == 1:  # with several processes, the batch norm of `disc` communicates
            parts.append(self.disc)
        return [part for part in parts if part is not None]

    def train(self, mode=True):
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()  # the dropout of `perceptual` must never run
        return self

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Work like nn.Module.load_state_dict, but ignore missing tensors `perceptual.*` and unneeded ones."""
        kept = {k: v for k, v in state_dict.items() if not k.startswith("perceptual.")}
        for name, value in self.state_dict().items():
            if name.startswith("perceptual."):
                kept[name] = state_dict.get(name, value)
        return super().load_state_dict(kept, strict, assign)
