"""Draws samples of codes. The seed and the number of a sample determine the sample."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from models.samplers import Sampler
from utils.core import distributed
from utils.core.progress import Progress
from utils.core.seed import sample_uniforms
from utils.training import compilation
from utils.training.amp import Precision


def sample_batches(
    sampler: Sampler, n: int, H: SimpleNamespace, precision: Precision, device: torch.device, first: int = 0
) -> Iterator[Tensor]:
    """Yield ids (b, L) of this process's share of the samples first ... first + n - 1. Only --seed and the number of a
    sample determine the sample. utils.core.distributed.in_order joins the shares of all processes."""
    own = list(distributed.turns(first, n, H.batch_size))
    numbers = [i for some, _ in own for i in some]

    def draw(rows: range) -> Tensor:
        return sample_uniforms(H.seed, [numbers[i] for i in rows], sampler.draws_per_sample(), device)

    sampler.fixed_shapes = device.type == "cuda"
    compilation.compile_model(sampler, H.compile, device, n >= compilation.MANY_SAMPLES)
    with Progress(n, "sampling", "img", workers=distributed.world_size()) as progress:
        batches = sampler.sample_many(draw, len(numbers), len(own[0][0]) if own else 1, H.temp, progress)
        for _, of_all in own:
            with precision.autocast():  # autocast ends before the yield, so the caller runs without it
                ids = next(batches)
            yield ids
            progress.update(of_all)
