"""Absorbing-state discrete diffusion (Austin et al. 2021, D3PM; Bond-Taylor et al. 2022).

At time t in {1..T} each code is, with probability t/T, replaced by the mask; the network predicts
the masked codes from the rest. Shapes: B samples, L tokens, K codes, T = total_steps, S = sampling steps.
"""

import math

import torch
import torch.nn.functional as F

from models.samplers.base import Sampler, SamplerLoss, draw_codes, register
from models.samplers.bound import balanced_masks, count_weights, stratified_counts
from models.samplers.reveal import Slots, in_order, reveal
from models.transformer import frozen

HISTORY_DECAY = 0.9
FLAGS = {
    "loss_type": {
        "default": "reweighted_elbo",
        "help": "training loss (absorbing)",
        "role": "training",
        "choices": ["reweighted_elbo", "elbo", "mlm"],
    },
    "mask_schedule": {
        "default": "random",
        "help": "mask each code with probability t/T, or exactly round(tL/T) codes (absorbing)",
        "role": "training sampling keyed",
        "choices": ["random", "fixed"],
    },
    "total_steps": {
        "default": 256,
        "help": "T, time steps of the diffusion in training (absorbing)",
        "role": "sampler",
        "min": 1,
        "max": 1_000_000,
    },
    "sample_steps": {
        "default": 256,
        "help": "S, time steps when sampling (absorbing)",
        "role": "sampling common keyed",
        "min": 1,
        "max": 1_000_000,
    },
    "sample_type": {
        "default": "diffusion",
        "help": "how to sample (absorbing)",
        "role": "sampling keyed",
        "choices": ["diffusion", "mlm"],
    },
}


@register("absorbing")
class AbsorbingDiffusion(Sampler):
    """The paper's prior. Buffers and parameter names are those of the published checkpoints."""

    def __init__(self, H):
        super().__init__(H)
        self.T = H.total_steps
        self.S = H.sample_steps
        self.loss_type = H.loss_type
        self.mask_schedule = H.mask_schedule
        self.sample_type = H.sample_type
        for name in ("Lt_history", "Lt_count", "loss_history"):
            self.register_buffer(name, torch.zeros(self.T + 1))
        self._denoise_fn = self.build_transformer(H, vocab_size=H.codebook_size + 1, causal=False)

    # ------------------------------------------------------------------ training

    def draw_mask(self, t, rng, L):
        """Which tokens are masked at times t (B,) -> bool (B, L).

        random: each with probability t/T. fixed: exactly max(1, round(t L / T)) of them.
        """
        if self.mask_schedule == "random":
            return self.random_mask(t, rng, L)
        count = (t * L / self.T).round().clamp(min=1)
        return rng.rand(len(t), L).argsort(1).argsort(1) < count[:, None]

    def random_mask(self, t, rng, L):
        """Mask each token with probability t/T. The bound uses these masks, whatever the schedule in training."""
        return rng.rand(len(t), L) < (t / self.T)[:, None]

    def cross_entropy(self, ids, mask):
        """Sum of the masked tokens' cross entropies, ids and mask (B, L) -> (B,) in nats."""
        rows, cols = mask.nonzero(as_tuple=True)
        logits = self._denoise_fn(ids.masked_fill(mask, self.mask_id), at=(rows, cols))
        nats = F.cross_entropy(logits.float(), ids[rows, cols], reduction="none")
        return nats.new_zeros(len(ids)).index_add(0, rows, nats)

    def loss(self, ids, rng=None, t=None, mask=None):
        """One Monte Carlo sample of the loss for ids (B, L).

        t (B,) int64 in 1..T and mask (B, L) bool may be given; then they are not drawn.
        bits: L_vb in bits per token, CE * T / (t L ln 2) (paper, eq. 6). It is a bound with random masks; with fixed
        masks only if T divides L.
        """
        B, L = ids.shape
        if t is None:
            t = (rng.rand(B) * self.T).long() + 1
        if mask is None:
            mask = self.draw_mask(t, rng, L)
        ce = self.cross_entropy(ids, mask)
        vb = ce * (self.T / t) / (math.log(2) * L)
        if self.loss_type == "elbo":
            per_sample = vb
        elif self.loss_type == "mlm":
            # A random mask can be empty: such a sample must contribute 0, not 0/0.
            per_sample = ce / mask.sum(1).clamp(min=1)
        else:  # reweighted_elbo (paper, eq. 8)
            per_sample = (1 - t / self.T) * ce / (math.log(2) * L)
        extra = dict(t=t, vb=vb.detach(), loss=per_sample.detach())
        return SamplerLoss(per_sample.mean(), vb.detach(), extra)

    def validation_loss(self, ids, rng):
        out = self.loss(ids, rng)
        if self.mask_schedule != "random":
            t = out.extra["t"]
            out.bits = self.loss(ids, t=t, mask=self.random_mask(t, rng, ids.shape[1])).bits
        return out

    @torch.no_grad()
    def record(self, extra):
        """Running statistics by time step: squared bound, count, loss (weights 0.9 old, 0.1 new)."""
        t = extra["t"]
        for buffer, new in ((self.Lt_history, extra["vb"].square()), (self.loss_history, extra["loss"])):
            mixed = HISTORY_DECAY * buffer[t] + (1 - HISTORY_DECAY) * new.to(buffer)
            # A time that is drawn twice in a batch counts once: the later sample's value.
            buffer.copy_(scatter_last(buffer, t, mixed))
        self.Lt_count.index_add_(0, t, torch.ones_like(t, dtype=self.Lt_count.dtype))

    def histories(self):
        return dict(loss_history=self.loss_history[1:], bound_history=self.Lt_history[1:].sqrt())

    # ------------------------------------------------------------------ likelihood

    @torch.no_grad()
    def nll(self, ids, rng=None, passes=0, progress=None):
        """An unbiased estimate of the bound sum_{t=T..1} E[CE_t] / t: ids (B, L) -> (B,) in nats.

        passes: the number of network passes. 0: T passes, with one mask drawn at each t, as in the original. Other
        values spread fewer masks evenly. The masks are random, whatever the schedule in training.
        """
        if passes:
            return self.stratified_nll(ids, rng, passes, progress)
        total = torch.zeros(len(ids), device=ids.device)
        for t in (progress or iter)(range(self.T, 0, -1)):
            times = torch.full((len(ids),), t, device=ids.device)
            total += self.cross_entropy(ids, self.random_mask(times, rng, ids.shape[1])) / t
        return total

    def stratified_nll(self, ids, rng, passes, progress=None):
        """The estimate of models.samplers.bound: far less noise for the same number of passes."""
        B, L = ids.shape
        weights = count_weights(self.T, L)
        counts = stratified_counts(weights, rng.rand(B), passes).to(ids.device)
        order = rng.rand(B, L).to(ids.device).argsort(1)
        total = torch.zeros(B, device=ids.device)
        masks = balanced_masks(counts, order)
        for m in (progress or iter)(counts.unbind(1)):
            mask = next(masks)
            total += self.cross_entropy(ids, mask) / m
        return total * (float(weights.sum()) / passes)

    # ------------------------------------------------------------------ sampling

    def predict(self, ids, rows, cols):
        return self._denoise_fn(ids, at=(rows, cols))

    def draws_per_sample(self):
        if self.sample_type == "mlm":
            return (self.S, 2, self.block_size)
        return (2, self.block_size)

    @torch.no_grad()
    def sample(self, uniforms, temp=1.0, progress=None):
        """uniforms (B, *draws_per_sample()) -> ids (B, L). progress: of the steps of mlm sampling only."""
        if self.sample_type == "mlm":
            with frozen(self):
                return self.sample_mlm(uniforms, temp, progress)
        return torch.cat(list(self.sample_many(lambda numbers: uniforms, len(uniforms), len(uniforms), temp)))

    def sample_many(self, draw, n, batch_size, temp=1.0, progress=None):
        """See the base class. In diffusion sampling the network's batches stay full until the last samples."""
        if self.sample_type == "mlm":
            yield from super().sample_many(draw, n, batch_size, temp, progress)
            return
        if n == 0:
            return
        slots = Slots(draw, n, batch_size, self.S, self.mask_id)
        with frozen(self):
            finished = reveal(self._denoise_fn, slots, temp, progress and progress.has_begun)
            yield from in_order(finished, n, batch_size)

    def sample_mlm(self, uniforms, temp, progress=None):
        """Masked-language-model sampling: mask as at time t (from T down to 1) and redraw, S times."""
        B, S, _, L = uniforms.shape
        ids = torch.zeros(B, L, dtype=torch.int64, device=uniforms.device)
        times = torch.linspace(self.T, 1, S).round().long().tolist()
        for s, t in enumerate((progress or iter)(times)):
            t_rows = torch.full((B,), t, device=ids.device)
            mask = self.draw_mask(t_rows, FixedDraw(uniforms[:, s, 0]), L)
            if s == 0:
                mask = torch.ones_like(mask)
            rows, cols = mask.nonzero(as_tuple=True)
            logits = self._denoise_fn(ids.masked_fill(mask, self.mask_id), at=(rows, cols))
            ids[rows, cols] = draw_codes(logits, uniforms[:, s, 1][rows, cols], temp)
        return ids


class FixedDraw:
    """Returns uniforms that were drawn before, with the interface of utils.core.seed.StepRandom."""

    def __init__(self, u):
        self.u = u

    def rand(self, *shape):
        return self.u.reshape(shape)


def scatter_last(buffer, index, values):
    """buffer with buffer[index] = values, the last of equal indices winning on every device."""
    position = torch.arange(len(index), device=index.device)
    last = torch.full_like(buffer, -1, dtype=torch.int64).scatter_reduce_(0, index, position, "amax")
    return torch.where(last >= 0, values[last.clamp(min=0)], buffer)
