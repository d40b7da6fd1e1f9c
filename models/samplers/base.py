"""The interface of every prior over codes. B samples, L tokens, K codes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.registry import Registry
from utils.core.device import send
from utils.core.errors import UserError
from utils.core.progress import Progress
from utils.core.seed import StepRandom

SAMPLERS = Registry("sampler")
register = SAMPLERS.register
COLDEST_PLAIN, HOTTEST = 1e-6, 1e30  # temperatures
Steps = Callable[[Sequence], Iterable]  # wraps the steps of a loop, to show its progress
Draw = Callable[[range], Tensor]  # numbers of samples -> their uniforms


def no_progress(steps: Sequence) -> Iterable:
    return steps


class Silent(Progress):
    """Shows nothing."""

    def __init__(self) -> None:
        super().__init__(0, "", lazy=True)
        self.plain = self.wants_bar = False


SILENT = Silent()


@dataclass
class SamplerLoss:
    """loss (): the value to minimise; bits (B,): the negative log likelihood of each sample, or a bound
    on it, in bits per token; extra: the input of the sampler's `record`, one row per sample."""

    loss: Tensor
    bits: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Sampler(nn.Module):
    """A distribution over ids (B, L) in [0, K).

    The arguments of a subclass's constructor are fields of the configuration with the same names, or `transformer`
    (models/build.py).

    Subclasses set `net` and implement `loss`, `nll`, `draws_per_sample` and `sample`. `predict` is needed for larger
    images only, `complete` to redraw a part of an image, `revealed_at` for pictures of the steps of sampling, `record`
    and `histories` for statistics of training.
    """

    net: nn.Module  # ids (B, L) -> logits (B, L, K)
    # Whether `loss` and `sample_many` compute tensors of the same shapes at each step. The caller sets it on a CUDA
    # device: the host would wait for other shapes, and torch.compile would compile again.
    fixed_shapes = False
    # Whether `predict` is right only if all tokens before a position are known and none after it.
    needs_raster_order = False

    def __init__(self, codebook_size: int, block_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.mask_id = codebook_size
        self.block_size = block_size

    def parts_to_compile(self) -> list[nn.Module]:
        """The modules to which torch.compile is applied: the blocks of a Transformer. All have the same shapes, so that
        compiling one compiles all."""
        return list(getattr(self.net, "blocks", []))

    def loss(self, ids: Tensor, rng: StepRandom) -> SamplerLoss:
        """Training loss of ids (B, L) int64."""
        raise NotImplementedError

    def validation_loss(self, ids: Tensor, rng: StepRandom) -> SamplerLoss:
        """Like `loss`, but its bits are always the negative log likelihood or a bound on it."""
        return self.loss(ids, rng)

    def record(self, extra: dict[str, Tensor]) -> None:
        """Take a SamplerLoss's `extra` into the training histories (buffers). Called by training only."""

    def histories(self) -> dict[str, Tensor]:
        """{name: values by time step} to show as bars."""
        return {}

    def draws_per_sample(self) -> tuple[int, ...]:
        """Shape of the uniforms in [0, 1) that one sample needs, e.g. (2, L)."""
        raise NotImplementedError

    def sample(self, uniforms: Tensor, temp: float = 1.0, progress: Steps = no_progress) -> Tensor:
        """Draw one sample for each row of `uniforms`, which `draws_per_sample` shapes.

        The caller provides all randomness, one row per sample, so that a sample does not depend
        on the batch that it is drawn in. Returns ids (B, L) int64.
        """
        raise NotImplementedError

    def sample_many(
        self, draw: Draw, n: int, batch_size: int, temp: float = 1.0, progress: Progress = SILENT
    ) -> Iterator[Tensor]:
        """Draw samples 0 .. n-1 and yield their ids (b, L), in order, batch_size (the last time fewer) at a time.

        draw: range of numbers -> their uniforms, as `sample` takes them.
        """
        for start in range(0, n, batch_size):
            numbers = range(start, min(start + batch_size, n))
            yield self.sample(draw(numbers), temp, progress.within(len(numbers)))

    def complete(self, known: Tensor, uniforms: Tensor, temp: float = 1.0) -> Tensor:
        """Draw the unknown tokens of sequences, given their known tokens, which stay as they are.

        known (B, L): ids, with `mask_id` where a token is to be drawn, at least one in each row; uniforms: as for
        `sample`. Returns ids (B, L). Raises UserError if the sampler cannot draw these tokens.
        """
        raise UserError("this sampler cannot redraw a part of an image")

    def revealed_at(self, ids: Tensor, uniforms: Tensor, temp: float = 1.0, unknown: Tensor | None = None) -> Tensor:
        """When each token of samples ids (B, L) is revealed: (B, L) in (0, 1], as a share of all sampling steps.

        uniforms, temp: those that the samples were drawn with. unknown (B, L) bool: the tokens that were drawn
        (default: all); the result of the others is 0. Raises UserError if the sampler does not reveal each token once.
        """
        raise UserError("this sampler does not reveal each code once: there are no steps to show")

    def predict(self, ids: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Logits (n, K) of unknown tokens `cols` (n,) of sequences `rows` (n,), given the known ones.

        ids (B, L) int64, L = block_size, with `mask_id` where a token is unknown.
        """
        raise NotImplementedError

    def nll(self, ids: Tensor, rng: StepRandom | None = None, passes: int = 0, progress: Steps = no_progress) -> Tensor:
        """Negative log likelihood, or an estimate of an upper bound on it: ids (B, L) -> (B,) in nats per sample.

        passes: the number of network passes (0: as the original); progress: called with a list of one entry per pass,
        returns an iterable of them. Exact samplers need none of these.
        """
        raise NotImplementedError


def draw_codes(logits: Tensor, u: Tensor, temp: float | Tensor = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw from softmax(logits / temp), truncated to its most probable codes, by inverting its distribution function.

    logits (..., K), u (...) uniform in [0, 1), temp: a number or (...), top_k, top_p: as for `truncated` -> ids (...)
    int64. Computes in float32 whatever the network's precision: in half precision the probabilities of 1024 codes would
    not sum to one.
    """
    return invert_cdf(truncated(tempered(logits.float(), temp), top_k, top_p), u)


def tempered(logits: Tensor, temp: float | Tensor) -> Tensor:
    """softmax(logits / temp) of float32 logits (..., K), finite at every temp from 1e-37 on. temp: a number or (...)"""
    if isinstance(temp, Tensor):
        return ((logits - logits.amax(-1, keepdim=True)) / temp.clamp(max=HOTTEST)[..., None]).softmax(-1)
    if temp < COLDEST_PLAIN:  # the quotient can overflow; at usual temperatures this does not change the rounding
        logits = logits - logits.amax(-1, keepdim=True)
    # Beyond HOTTEST, where all codes are equally likely, temp can be infinite in float32: -inf / inf is no number.
    return (logits / min(temp, HOTTEST)).softmax(-1)


def temperature(temp: float, temp_end: float | None, share: Any, device: torch.device) -> float | Tensor:
    """The temperature after a share of the steps in [0, 1], a number or an array: linear from temp to temp_end.
    Returns a float32 tensor of the share's shape, or temp if temp_end is None."""
    if temp_end is None:
        return temp
    return send(torch.as_tensor(temp + (temp_end - temp) * share, dtype=torch.float32), device)


def truncated(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set probs (..., K) to 0 except for the top_k most probable codes (0: all), and among these except for the
    fewest most probable ones whose share of their sum is at least top_p (Holtzman et al. 2020, nucleus sampling). Of
    equal codes the first counts as the more probable. The result is not renormalised."""
    if not top_k and top_p == 1:
        return probs
    ordered, codes = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ordered = ordered * (rank < (top_k or len(rank)))
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p * ordered.sum(-1, keepdim=True)) | (rank == 0)
    return torch.zeros_like(probs).scatter(-1, codes, ordered * kept)


def invert_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The first code whose cumulative probability exceeds u. probs (..., K), u (...) -> ids (...)."""
    cdf = probs.cumsum(-1)
    # Scaled by the sum, so that rounding cannot leave u above the last entry.
    ids = torch.searchsorted(cdf, (u.to(cdf) * cdf[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    # u * sum can round up to the sum itself: then the last code of positive probability is meant.
    return torch.minimum(ids, last_possible(probs))


def last_possible(probs: Tensor) -> Tensor:
    """Index of the last code with positive probability, probs (..., K) -> (...)."""
    K = probs.shape[-1]
    return K - 1 - (probs.flip(-1) > 0).to(torch.uint8).argmax(-1)
