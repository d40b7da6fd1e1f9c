"""How unlikely a prior finds a picture and each code of it. Shapes: B pictures, L codes, P passes."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fast import frozen
from models.samplers.bound import balanced_masks, stratified_counts
from utils.core.errors import UserError
from utils.core.seed import StepRandom


@torch.no_grad()
def negative_log_likelihood(
    sampler, ids: Tensor, seed: int, passes: int, repeats: int = 1, batch_size: int = 64, what: str = "images"
) -> Tensor:
    """Estimates of the negative log likelihood of ids (B, L), in nats per picture: (B, repeats) float64 on the CPU.

    An absorbing sampler gives unbiased estimates of its upper bound (Sampler.nll), each in `passes` passes of the
    network. The random numbers of a picture depend on its number in `ids`, seed, `what` and the repetition. They do not
    depend on batch_size. An autoregressive sampler gives the exact value.
    """
    found = []
    for repeat in range(repeats):
        rng = StepRandom("judge", seed, what, repeat)
        rows = torch.cat([rng.rand(1, ids.shape[1] + 1) for _ in ids])
        parts = zip(ids.split(batch_size), rows.split(batch_size), strict=True)
        found.append(torch.cat([sampler.nll(part, Rows(own), passes).cpu().double() for part, own in parts]))
    return torch.stack(found, 1)


class Rows:
    """Gives the random numbers of given rows (B, 1 + L): first those for (B,), then those for (B, L)."""

    def __init__(self, rows: Tensor):
        self.parts = [rows[:, 0], rows[:, 1:]]

    def rand(self, *shape: int) -> Tensor:
        return self.parts.pop(0).view(shape)


@torch.no_grad()
def surprise(sampler, ids: Tensor, rng: StepRandom | None = None, passes: int = 0) -> Tensor:
    """Bits of each code of ids (B, L), given other codes: -log2 p(code | others), (B, L) float32.

    passes 0: given all other codes; L passes of the network. Otherwise the mean over random subsets of the other codes,
    which have a uniformly random number of codes: an unbiased estimate in this number of passes, from random numbers of
    rng. Its sum over the codes estimates -log2 p(ids) of a consistent network: the chain rule, averaged over all
    orders.
    Raises UserError for a sampler that needs raster order.
    """
    if sampler.needs_raster_order:
        raise UserError("this sampler predicts a code only from the codes before it: give an absorbing sampler")
    B, L = ids.shape
    total = torch.zeros(B, L, device=ids.device)
    weighted: Iterable[tuple[Tensor, Tensor]]
    if passes:
        assert rng is not None
        counts = stratified_counts(torch.ones(L, dtype=torch.float64), rng.rand(B), passes).to(ids.device)
        masks = balanced_masks(counts, rng.rand(B, L).to(ids.device).argsort(1))
        weighted = zip(counts.unbind(1), masks, strict=True)
    else:
        alone = torch.eye(L, dtype=torch.bool, device=ids.device)
        weighted = ((torch.ones(B, device=ids.device), one.expand(B, -1)) for one in alone)
    with frozen(sampler):
        for count, mask in weighted:
            rows, cols = mask.nonzero(as_tuple=True)
            logits = sampler.predict(ids.masked_fill(mask, sampler.mask_id), rows, cols)
            nats = F.cross_entropy(logits.float(), ids[rows, cols], reduction="none")
            total[rows, cols] += nats / count[rows]
    return total * (L / passes if passes else 1) / math.log(2)
