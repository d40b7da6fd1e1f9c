"""Redraws a part of a picture: the codes of some cells are drawn again from the prior, given the codes of the others.

Shapes: B pictures of C channels and H x W pixels, h x w cells with one code each, L = h w. A mask (B, H, W) bool marks
the pixels that are to change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def touched_cells(mask: Tensor, shape: tuple[int, int], dilate: int = 0) -> Tensor:
    """Return the cells that a mask touches, and all cells that are at most `dilate` rows and columns away: (B, h, w)
    bool. shape: (h, w), which divides the size of the mask."""
    touched = F.adaptive_max_pool2d(mask[:, None].float(), shape)
    return F.max_pool2d(touched, 2 * dilate + 1, 1, dilate)[:, 0] > 0


def random_cells(u: Tensor, share: float) -> Tensor:
    """Choose a share of the cells, rounded to at least one: the ones with the smallest uniforms u (B, h, w). Returns
    (B, h, w) bool. Each cell that a share chooses is also in all larger shares."""
    ranks = u.flatten(1).argsort(dim=1, stable=True).argsort(1)
    return (ranks < max(1, round(share * ranks.shape[1]))).view_as(u)


def distances(mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each pixel, return the Euclidean distance to the nearest marked pixel, (B, H, W) float32, and the flat
    position of that pixel, (B, H, W) int64. Each mask must mark a pixel."""
    from scipy.ndimage import distance_transform_edt  # here: few programs need it

    far, near = [], []
    for one in mask.cpu().numpy():
        distance, (rows, columns) = distance_transform_edt(~one, return_indices=True)
        far.append(torch.from_numpy(distance).float())
        near.append(torch.from_numpy(rows.astype("int64") * one.shape[1] + columns))
    return torch.stack(far).to(mask.device), torch.stack(near).to(mask.device)


def hide(x: Tensor, mask: Tensor) -> Tensor:
    """Replace each masked pixel of x (B, C, H, W) by the nearest kept pixel, or by 0.5 if no pixel is kept. The result
    does not depend on the masked pixels. The encoder's receptive field is larger than a cell, so that the codes of kept
    cells would otherwise depend on what is to be replaced."""
    nothing_kept = mask.flatten(1).all(1)
    near = distances(~mask | nothing_kept[:, None, None])[1]
    filled = x.flatten(2).gather(2, near.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return torch.where(nothing_kept[:, None, None, None], 0.5, filled)


def redraw(sampler, ids: Tensor, cells: Tensor, uniforms: Tensor, temp: float = 1.0) -> Tensor:
    """Draw the codes of `cells` (B, h, w) bool again, given the other codes of ids (B, L), which stay as they are.

    sampler: a models.samplers.Sampler; uniforms: one row for each picture, as for sampler.sample. With a consistent
    network, one code a pass and temp 1, this is a draw from the prior's conditional distribution. Returns ids (B, L).
    Raises UserError if the sampler cannot draw these codes, and ValueError if a picture has no cell to redraw.
    """
    cells = cells.flatten(1)
    if not cells.any(1).all():
        raise ValueError("a picture has no code to redraw")
    return sampler.complete(ids.masked_fill(cells, sampler.mask_id), uniforms, temp)


def blend(original: Tensor, drawn: Tensor, mask: Tensor, width: int) -> Tensor:
    """Paste the kept pixels of a picture over an edited one with a soft edge. original, drawn: (B, C, H, W) floats.

    The weight of `drawn` is 1 in the mask. Outside it falls linearly with the distance d in pixels from the nearest
    masked pixel, 1 - d / (width + 1): pixels that are more than `width` away are exactly those of `original`.
    """
    weight = (1 - distances(mask)[0] / (width + 1)).clamp(0, 1)[:, None]
    return torch.where(weight > 0, torch.lerp(original, drawn, weight), original)
