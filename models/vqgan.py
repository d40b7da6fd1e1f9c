"""The whole of stage 1: autoencoder, discriminator, perceptual distance, under the published names."""

from torch import nn

from models.autoencoder import VQAutoEncoder
from models.discriminator import Discriminator


class VQGAN(nn.Module):
    """Holds `ae`, `disc` and, where perceptual_weight > 0, `perceptual` (LPIPS with VGG16, frozen).

    The arithmetic of training stands in train_vqgan.py.
    """

    def __init__(self, H, perceptual=None):
        super().__init__()
        self.ae = VQAutoEncoder(H)
        self.disc = Discriminator(H.n_channels, H.ndf, H.disc_layers)
        self.perceptual = perceptual
        if perceptual is not None:
            perceptual.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()  # its dropout must never run
        return self
