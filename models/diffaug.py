"""Differentiable augmentation (Zhao et al. 2020): colour and translation, drawn for each image."""

import torch
import torch.nn.functional as F

TRANSLATION = 1 / 8


def diff_augment(x, rng):
    """Brightness, saturation, contrast and translation of x (B, C, H, W); differentiable in x.

    rng: utils.core.seed.StepRandom, so that the draw belongs to (seed, step, sample), not to the process.
    """
    B, _, height, width = x.shape
    brightness, saturation, contrast, shift_y, shift_x = rng.rand(B, 5).unbind(1)

    def column(v):
        return v.reshape(B, 1, 1, 1)

    x = x + column(brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * column(2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * column(contrast + 0.5) + mean
    return translate(x, whole_shift(shift_y, height), whole_shift(shift_x, width))


def whole_shift(u, size):
    """u in [0, 1) -> an integer shift, uniform on [-s, s] with s = size/8 rounded."""
    s = int(size * TRANSLATION + 0.5)
    return (u * (2 * s + 1)).floor().long() - s


def translate(x, dy, dx):
    """Move image b by (dy[b], dx[b]) pixels; pixels from outside the image are zero."""
    B, C, H, W = x.shape
    # One ring of zeros is enough: every index outside the image is clamped onto it.
    padded = F.pad(x, (1, 1, 1, 1))
    rows = (torch.arange(H, device=x.device) + 1 - dy[:, None]).clamp(0, H + 1)
    cols = (torch.arange(W, device=x.device) + 1 - dx[:, None]).clamp(0, W + 1)
    batch = torch.arange(B, device=x.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)
