"""Decodes large canvases in overlapping tiles, with the memory of one tile and without visible seams.

GroupNorm and attention see only the tile, so neighbouring tiles differ slightly everywhere. Neighbouring tiles are
therefore blended over their complete overlap. The convolutions' padding distorts the border of a tile. The distortion
is visible with an overlap of a quarter of a tile, but not with half a tile.
"""

import math

import torch


def decode_tiled(decode, ids, tile, overlap=None):
    """Decode a canvas of codes in tiles of `tile` x `tile` latents. The tiles are blended with weights that sum to one.

    decode: a function, ids (h, w) -> picture (C, s*h, s*w) with s pixels per latent. ids: (H, W). overlap: the least
    overlap of neighbouring tiles in latents, below `tile`; default: half a tile. Returns (C, s*H, s*W) float32 on the
    CPU.
    A canvas that fits in one tile is decoded at once. If a canvas is smaller than a tile in one direction only, the
    tiles become smaller in this direction.
    """
    H, W = ids.shape
    if max(H, W) <= tile:
        return decode(ids).float().cpu()
    overlap = tile // 2 if overlap is None else overlap
    tops, lefts = tile_starts(H, tile, overlap), tile_starts(W, tile, overlap)
    h, w = min(tile, H), min(tile, W)
    picture = None
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = decode(ids[top : top + h, left : left + w]).float().cpu()
            if picture is None:
                s = part.shape[1] // h
                picture = part.new_zeros(len(part), s * H, s * W)
                down, across = blend_weights(tops, h, H, s), blend_weights(lefts, w, W, s)
            rows, cols = slice(s * top, s * (top + h)), slice(s * left, s * (left + w))
            picture[:, rows, cols] += down[i, rows, None] * across[j, None, cols] * part
    return picture


def tile_starts(length, tile, overlap):
    """Return the starts of evenly spaced tiles that cover `length` latents and do not go beyond: list of int."""
    if length <= tile:
        return [0]
    gaps = math.ceil((length - tile) / (tile - overlap))
    return [i * (length - tile) // gaps for i in range(gaps + 1)]


def blend_weights(starts, tile, length, scale):
    """Return the weight of each tile at each pixel along one axis, (tiles, scale * length) float32. Each column sums to
    one. In an overlap, the weight of one tile rises from 0 to 1 along half a cosine. The weight of its neighbour falls
    from 1 to 0."""
    x = torch.arange(scale * length) + 0.5
    weights = torch.zeros(len(starts), scale * length)
    for i, start in enumerate(starts):
        weight = ((x > scale * start) & (x < scale * (start + tile))).float()
        if i > 0:
            weight *= rise(x, scale * start, scale * (starts[i - 1] + tile))
        if i + 1 < len(starts):
            weight *= 1 - rise(x, scale * starts[i + 1], scale * (start + tile))
        weights[i] = weight
    return weights / weights.sum(0)  # divide by the sum, because three tiles or more may overlap


def rise(x, start, end):
    """Rise smoothly from 0 at `start` to 1 at `end`. If both are equal, the result is a step."""
    return (1 - (((x - start) / max(end - start, 1e-9)).clamp(0, 1) * math.pi).cos()) / 2
