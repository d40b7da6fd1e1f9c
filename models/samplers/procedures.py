"""The ways in which the absorbing diffusion draws samples. A model has one, chosen when it is built; the methods are
those of models.samplers.base.Sampler, with the model as the first argument. B samples, L tokens, S sampling steps."""

import torch

from models.fast import frozen
from models.samplers.base import SILENT, Sampler
from models.samplers.orders import KnownOrder
from models.samplers.reveal import batches_by_number, draw_in_full_batches


def procedure_of(sample_type, order, remask_eta):
    """sample_type: 'diffusion' or 'mlm'; order: a subclass of models.samplers.orders.Order; remask_eta: the share of
    remasking."""
    if sample_type == "mlm":
        return Redraw()
    return RevealInFullBatches() if issubclass(order, KnownOrder) and not remask_eta else Reveal()


class Reveal:
    """Draws in the model's order by the plain loop. An order that looks at the predictions, and remasking, need new
    random numbers at each time: what was not kept must not be drawn again."""

    def draws_per_sample(self, model):
        return (model.S, 3 if model.remask_eta else 2, model.block_size)

    def sample(self, model, uniforms, temp, progress, known=None):
        with frozen(model):
            return model.sample_plainly(uniforms, temp, progress, known)

    def sample_many(self, model, *args):
        return Sampler.sample_many(model, *args)  # one batch after the other

    def revealed_at(self, model, ids, uniforms, temp, unknown):
        """The predictions decide when a token is revealed. The samples are therefore drawn again."""
        if model.remask_eta:
            return Sampler.revealed_at(model, ids, uniforms)
        shares = torch.zeros(ids.shape, device=ids.device)

        def on_pass(t, now):
            shares[unknown & (shares == 0) & (now != model.mask_id)] = (model.S + 1 - t) / model.S

        with frozen(model):
            model.sample_plainly(uniforms, temp, known=ids.masked_fill(unknown, model.mask_id), on_pass=on_pass)
        return shares


class RevealInFullBatches(Reveal):
    """Draws each token once, in an order that is known before the network runs; samples share passes."""

    def draws_per_sample(self, model):
        return (2, model.block_size)

    def sample(self, model, uniforms, temp, progress, known=None):
        n = len(uniforms)
        return torch.cat(list(self.sample_many(model, lambda numbers: uniforms, n, n, temp, SILENT, known)))

    def sample_many(self, model, draw, n, batch_size, temp, progress, known=None):
        if n > 0:
            finished = draw_in_full_batches(model, draw, n, batch_size, temp, progress.has_begun, known)
            with frozen(model):
                yield from batches_by_number(finished, n, batch_size)

    def revealed_at(self, model, ids, uniforms, temp, unknown):
        shares = (model.S + 1 - model.order_of(uniforms[:, 0], unknown).times()) / model.S
        return shares.where(unknown, 0)


class Redraw(Reveal):
    """Masked-language-model sampling: mask as at time t (from T down to 1) and draw again what is masked, S times."""

    def sample(self, model, uniforms, temp, progress, known=None):
        B, S, _, L = uniforms.shape
        ids = torch.full((B, L), model.mask_id, device=uniforms.device) if known is None else known.clone()
        unknown = ids == model.mask_id
        times = torch.linspace(model.T, 1, S).round().long().tolist()  # at the first, T, everything is masked
        with frozen(model):
            for step, (t, step_u) in enumerate(zip(progress(times), uniforms.unbind(1), strict=True)):
                mask_u, code_u = step_u.unbind(1)
                mask = unknown & model.mask_of(torch.full((B,), t, device=ids.device), mask_u)
                at = mask.nonzero(as_tuple=True)
                logits = model.net(ids.masked_fill(mask, model.mask_id), at=at)
                ids[at] = model.draw_at(S - step, logits, code_u[at], temp)
        return ids

    def revealed_at(self, model, ids, uniforms, temp, unknown):
        return Sampler.revealed_at(model, ids, uniforms)
