"""Samples of codes, each a function of the seed and its number."""

from utils.core import distributed
from utils.core.progress import Progress
from utils.core.seed import sample_uniforms
from utils.training import compilation


def sample_batches(sampler, n, H, precision, device, first=0):
    """Yield ids (b, L) for samples first .. first+n-1, each a function of (--seed, its number) alone: this process's
    share of them, as utils.core.distributed.in_order puts together."""
    own = list(distributed.turns(first, n, H.batch_size))
    numbers = [i for some, _ in own for i in some]

    def draw(rows):
        return sample_uniforms(H.seed, [numbers[i] for i in rows], sampler.draws_per_sample(), device)

    compilation.compile_model(sampler, H.compile, device, n >= compilation.MANY_SAMPLES)
    with Progress(n, "sampling", "img", workers=distributed.world_size()) as progress:
        batches = sampler.sample_many(draw, len(numbers), len(own[0][0]) if own else 1, H.temp, progress)
        for _, of_all in own:
            with precision.autocast():  # not while others work on what is yielded
                ids = next(batches)
            yield ids
            progress.update(of_all)
