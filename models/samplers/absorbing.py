"""Absorbing-state discrete diffusion (Austin et al. 2021, D3PM; Bond-Taylor et al. 2022).

At time t in {1..T} each code is, with probability t/T, replaced by the mask; the network predicts
the masked codes from the rest. Shapes: B samples, L tokens, K codes, T = total_steps, S = sampling steps.
"""

import math

import torch
import torch.nn.functional as F

from models.samplers.base import SILENT, Sampler, SamplerLoss, draw_codes, no_progress, register, temperature
from models.samplers.bound import balanced_masks, count_weights, stratified_counts
from models.samplers.orders import ORDERS
from models.samplers.procedures import procedure_of
from models.samplers.schedules import Pace
from models.transformer import Transformer

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
        "help": "mask each code with probability t/T, or round(tL/T) codes (absorbing)",
        "role": "training sampling keyed advanced",
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
        "role": "sampling keyed advanced",
        "choices": ["diffusion", "mlm"],
    },
    "sample_schedule": {
        "default": "uniform",
        "help": "how many codes each step reveals: uniform, cosine or arccos (few at first)",
        "metavar": "NAME",
        "role": "sampling",
        "choices": ["uniform", "cosine", "arccos"],
        "exclusive": True,
    },
    "remask_eta": {
        "default": 0.0,
        "help": "share of the codes that can be masked again and are (ReMDM); 0: none",
        "role": "sampling advanced",
        "min": 0.0,
        "max": 1.0,
        "exclusive": True,
    },
    "top_k": {
        "default": 0,
        "help": "draw from the k most probable codes; 0: from all",
        "role": "sampling advanced",
        "min": 0,
    },
    "top_p": {
        "default": 1.0,
        "help": "draw from the most probable codes of this total probability",
        "role": "sampling advanced",
        "above": 0.0,
        "max": 1.0,
    },
}


@register("absorbing")
class AbsorbingDiffusion(Sampler):
    """The paper's prior. Buffers and parameter names are those of the published checkpoints."""

    Lt_history: torch.Tensor
    Lt_count: torch.Tensor
    loss_history: torch.Tensor

    def __init__(
        self,
        codebook_size,
        block_size,
        transformer,
        total_steps,
        sample_steps,
        loss_type,
        mask_schedule,
        sample_type,
        latent_shape,
        sample_order,
        sample_schedule,
        temp_end,
        top_k,
        top_p,
        remask_eta,
    ):
        super().__init__(codebook_size, block_size)
        self.T = total_steps
        self.S = sample_steps
        self.loss_type = loss_type
        self.mask_schedule = mask_schedule
        self.grid = tuple(latent_shape[1:])
        self.order, self.schedule = ORDERS[sample_order], sample_schedule
        self.remask_eta = remask_eta
        self.temp_end, self.top_k, self.top_p = temp_end, top_k, top_p
        self.procedure = procedure_of(sample_type, self.order, remask_eta)
        for name in ("Lt_history", "Lt_count", "loss_history"):
            self.register_buffer(name, torch.zeros(self.T + 1))
        self._denoise_fn = Transformer(transformer, vocab_size=codebook_size + 1, n_classes=codebook_size, causal=False)

    @property
    def net(self):  # type: ignore[override]
        return self._denoise_fn

    # ------------------------------------------------------------------ sampling

    def order_of(self, u, unknown, grid=None):
        """The order of a batch from its uniforms u, (B, L) or (B, S, L); unknown (B, L) bool: the tokens to draw; grid:
        height and width of the codes, if they are not those of training."""
        u = u if u.ndim == 3 else u[:, None].expand(-1, self.S, -1)
        return self.order(u, Pace(self.S, self.schedule, self.remask_eta), unknown, grid or self.grid)

    def draw_at(self, t, logits, u, temp):
        """Codes drawn at time t, a number or an array (...): logits (..., K), u (...) -> ids (...). The temperature is
        temp at t = S and temp_end at t = 1."""
        now = temperature(temp, self.temp_end, (self.S - t) / max(self.S - 1, 1), u.device)
        return draw_codes(logits, u, now, self.top_k, self.top_p)

    @torch.no_grad()
    def sample_plainly(self, uniforms, temp=1.0, progress=no_progress, known=None, on_pass=None, grid=None, net=None):
        """Sampling by its definition: all tokens are masked; at each time t = S..1 the network predicts them all, and
        those that the order reveals are drawn.

        uniforms (B, 2, L), of the order and of the codes, or (B, S, 2, L), other ones for each time, or with remasking
        (B, S, 3, L), the third to choose the tokens that are masked again; known (B, L): ids
        to begin with, which stay as they are, with mask_id where a token is to be drawn. on_pass: is called with t and
        ids after each pass; grid: as for order_of; net: predicts instead of the network, ids (B, L) -> logits
        (B, L, K). Returns ids (B, L).
        """
        net = net or self.net
        u = uniforms if uniforms.ndim == 4 else uniforms[:, None].expand(-1, self.S, -1, -1)
        order_u, code_u, *remask_u = u.unbind(2)  # (B, S, L)
        ids = torch.full_like(code_u[:, 0], self.mask_id, dtype=torch.int64) if known is None else known
        order = self.order_of(order_u, ids == self.mask_id, grid)
        for t in progress(order.times_of_passes()):
            logits = net(ids)  # (B, L, K)
            codes = self.draw_at(t, logits, code_u[:, self.S - t], temp)
            masked = ids == self.mask_id
            ids = torch.where(order.reveals(t, masked, logits, codes), codes, ids)
            if remask_u:
                again = order.remasks(t, order.unknown & ~masked, remask_u[0][:, self.S - t])
                ids = ids.masked_fill(again, self.mask_id)
            if on_pass:
                on_pass(t, ids)
        return ids

    def draws_per_sample(self):
        return self.procedure.draws_per_sample(self)

    @torch.no_grad()
    def sample(self, uniforms, temp=1.0, progress=no_progress):
        """uniforms (B, *draws_per_sample()) -> ids (B, L)."""
        return self.procedure.sample(self, uniforms, temp, progress)

    def sample_many(self, draw, n, batch_size, temp=1.0, progress=SILENT):
        return self.procedure.sample_many(self, draw, n, batch_size, temp, progress)

    @torch.no_grad()
    def complete(self, known, uniforms, temp=1.0):
        return self.procedure.sample(self, uniforms, temp, no_progress, known)

    @torch.no_grad()
    def revealed_at(self, ids, uniforms, temp=1.0, unknown=None):
        unknown = torch.ones_like(ids, dtype=torch.bool) if unknown is None else unknown
        return self.procedure.revealed_at(self, ids, uniforms, temp, unknown)

    def predict(self, ids, rows, cols):
        return self.net(ids, at=(rows, cols))

    # ------------------------------------------------------------------ training

    def mask_of(self, t, u):
        """Which tokens are masked at times t (B,), from uniforms u (B, L) -> bool (B, L).

        random: each with probability t/T. fixed: exactly max(1, round(t L / T)) of them.
        """
        if self.mask_schedule == "random":
            return self.random_mask(t, u)
        count = (t * u.shape[1] / self.T).round().clamp(min=1)
        return u.argsort(1).argsort(1) < count[:, None]

    def random_mask(self, t, u):
        """Mask each token with probability t/T. The bound uses these masks, whatever the schedule in training."""
        return u < (t / self.T)[:, None]

    def cross_entropy(self, ids, mask, fixed_shapes=False):
        """Sum of the masked tokens' cross entropies, ids and mask (B, L) -> (B,) in nats.

        fixed_shapes: compute the logits of all tokens. Otherwise only those of the masked ones are computed, and the
        host must know how many there are.
        """
        if fixed_shapes:
            logits = self.net(ids.masked_fill(mask, self.mask_id))  # (B, L, K)
            nats = F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
            return nats.where(mask, 0.0).sum(1)
        rows, cols = mask.nonzero(as_tuple=True)
        logits = self.net(ids.masked_fill(mask, self.mask_id), at=(rows, cols))
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
            mask = self.mask_of(t, rng.rand(B, L))
        ce = self.cross_entropy(ids, mask, self.fixed_shapes)
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
            out.bits = self.loss(ids, t=t, mask=self.random_mask(t, rng.rand(*ids.shape))).bits
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
    def nll(self, ids, rng=None, passes=0, progress=no_progress):
        """An unbiased estimate of the bound sum_{t=T..1} E[CE_t] / t: ids (B, L) -> (B,) in nats.

        passes: the number of network passes. 0: T passes, with one mask drawn at each t, as in the original. Other
        values spread fewer masks evenly. The masks are random, whatever the schedule in training.
        """
        if passes:
            return self.stratified_nll(ids, rng, passes, progress)
        total = torch.zeros(len(ids), device=ids.device)
        for t in progress(range(self.T, 0, -1)):
            times = torch.full((len(ids),), t, device=ids.device)
            total += self.cross_entropy(ids, self.random_mask(times, rng.rand(*ids.shape))) / t
        return total

    def stratified_nll(self, ids, rng, passes, progress=no_progress):
        """The estimate of models.samplers.bound: far less noise for the same number of passes."""
        B, L = ids.shape
        weights = count_weights(self.T, L)
        counts = stratified_counts(weights, rng.rand(B), passes).to(ids.device)
        order = rng.rand(B, L).to(ids.device).argsort(1)
        total = torch.zeros(B, device=ids.device)
        for m, mask in zip(progress(counts.unbind(1)), balanced_masks(counts, order), strict=True):
            total += self.cross_entropy(ids, mask) / m
        return total * (float(weights.sum()) / passes)


def scatter_last(buffer, index, values):
    """buffer with buffer[index] = values, the last of equal indices winning on every device."""
    position = torch.arange(len(index), device=index.device)
    last = torch.full_like(buffer, -1, dtype=torch.int64).scatter_reduce_(0, index, position, "amax")
    return torch.where(last >= 0, values[last.clamp(min=0)], buffer)
