"""The interface of every prior over codes. B samples, L tokens, K codes."""

from dataclasses import dataclass, field

import torch
from torch import nn

from models.transformer import Transformer

SAMPLERS = {}
COLDEST_PLAIN, HOTTEST = 1e-6, 1e30  # temperatures


def register(name):
    """Class decorator: make the sampler available as `--sampler name`."""

    def add(cls):
        SAMPLERS[name] = cls
        return cls

    return add


@dataclass
class SamplerLoss:
    """loss (): the value to minimise; bits (B,): the negative log likelihood of each sample, or a bound
    on it, in bits per token; extra: the input of the sampler's `record`, one row per sample."""

    loss: torch.Tensor
    bits: torch.Tensor
    extra: dict = field(default_factory=dict)


class Sampler(nn.Module):
    """A distribution over ids (B, L) in [0, K).

    Subclasses implement `loss`, `sample`, `predict` and `nll`; `record` and `histories` if they keep
    statistics of training.
    """

    # Whether `predict` is right only if all tokens before a position are known and none after it.
    needs_raster_order = False

    def __init__(self, H):
        super().__init__()
        self.codebook_size = H.codebook_size
        self.mask_id = H.codebook_size
        self.block_size = H.block_size

    @staticmethod
    def build_transformer(H, vocab_size, causal):
        return Transformer(
            vocab_size,
            H.codebook_size,
            H.block_size,
            H.bert_n_emb,
            H.bert_n_head,
            H.bert_n_layers,
            causal,
            H.embd_pdrop,
            H.attn_pdrop,
            H.resid_pdrop,
        )

    @property
    def net(self):
        """The Transformer. Its attribute has the name of the published checkpoints, which differs between samplers."""
        return next(m for m in self.children() if isinstance(m, Transformer))

    def parts_to_compile(self):
        """The blocks of the Transformers. All have the same shapes, so that compiling one compiles all."""
        return [block for m in self.modules() if isinstance(m, Transformer) for block in m.blocks]

    def loss(self, ids, rng):
        """Training loss of ids (B, L) int64 -> SamplerLoss. rng: utils.core.seed.StepRandom."""
        raise NotImplementedError

    def validation_loss(self, ids, rng):
        """Like `loss`, but its bits are always the negative log likelihood or a bound on it."""
        return self.loss(ids, rng)

    def record(self, extra):
        """Take a SamplerLoss's `extra` into the training histories (buffers). Called by training only."""

    def histories(self):
        """{name: values by time step} to show as bars."""
        return {}

    def sample(self, uniforms, temp=1.0, progress=None):
        """Draw one sample for each row of `uniforms`, which `draws_per_sample` shapes.

        The caller provides all randomness, one row per sample, so that a sample does not depend
        on the batch that it is drawn in. Returns ids (B, L) int64.
        """
        raise NotImplementedError

    def sample_many(self, draw, n, batch_size, temp=1.0, progress=None):
        """Draw samples 0 .. n-1 and yield their ids (b, L), in order, batch_size (the last time fewer) at a time.

        draw: range of numbers -> their uniforms, as `sample` takes them; progress: utils.core.progress.Progress.
        """
        for start in range(0, n, batch_size):
            numbers = range(start, min(start + batch_size, n))
            yield self.sample(draw(numbers), temp, progress and progress.within(len(numbers)))

    def draws_per_sample(self):
        """Shape of the uniforms in [0, 1) that one sample needs, e.g. (2, L)."""
        raise NotImplementedError

    def predict(self, ids, rows, cols):
        """Logits (n, K) of unknown tokens `cols` (n,) of sequences `rows` (n,), given the known ones.

        ids (B, L) int64, L = block_size, with `mask_id` where a token is unknown.
        """
        raise NotImplementedError

    def nll(self, ids, rng=None, passes=0, progress=None):
        """Negative log likelihood, or an estimate of an upper bound on it: ids (B, L) -> (B,) in nats per sample.

        rng: utils.core.seed.StepRandom; passes: the number of network passes (0: as the original); progress: called
        with a list of one entry per pass, returns an iterable of them. Exact samplers need none of these.
        """
        raise NotImplementedError


def draw_codes(logits, u, temp=1.0):
    """Draw from softmax(logits / temp) by inverting its distribution function.

    logits (..., K), u (...) uniform in [0, 1) -> ids (...) int64. Computes in float32 whatever the network's
    precision: in half precision the probabilities of 1024 codes would not sum to one.
    """
    return invert_cdf(tempered(logits.float(), temp), u)


def tempered(logits, temp):
    """softmax(logits / temp) of float32 logits (..., K), finite at every temp from 1e-37 on."""
    if temp < COLDEST_PLAIN:  # the quotient can overflow; at usual temperatures this does not change the rounding
        logits = logits - logits.amax(-1, keepdim=True)
    # Beyond HOTTEST, where all codes are equally likely, temp can be infinite in float32: -inf / inf is no number.
    return (logits / min(temp, HOTTEST)).softmax(-1)


def invert_cdf(probs, u):
    """The first code whose cumulative probability exceeds u. probs (..., K), u (...) -> ids (...)."""
    cdf = probs.cumsum(-1)
    # Scaled by the sum, so that rounding cannot leave u above the last entry.
    ids = torch.searchsorted(cdf, (u.to(cdf) * cdf[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    # u * sum can round up to the sum itself: then the last code of positive probability is meant.
    return torch.minimum(ids, last_possible(probs))


def last_possible(probs):
    """Index of the last code with positive probability, probs (..., K) -> (...)."""
    K = probs.shape[-1]
    return K - 1 - (probs.flip(-1) > 0).to(torch.uint8).argmax(-1)
