"""The fast form of AbsorbingDiffusion.sample_plainly, for an order that is known before the network runs.

The network runs only at times at which something is revealed, each sample at its own next event, and computes only what
is revealed. A finished sample gives its place in the batch to the next one. In random order with the uniform schedule
this takes S (1 - (1 - 1/S)^L) passes on average, 162 for S = L = 256. The samples are the same.

Shapes: B samples at a time, L tokens, S sampling steps.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.core.device import send


class Rows(NamedTuple):
    """The samples that are being drawn, one in each row. The tensors are on the device, the arrays on the CPU."""

    ids: Tensor  # (B, L)
    code_u: Tensor  # (B, L): the uniforms that the codes are drawn with
    times: np.ndarray  # (B, L): at which each token is revealed
    events: np.ndarray  # (B, L): the event (0, 1, ... of its sample) that reveals each token
    numbers: np.ndarray  # (B,): of the samples
    done: np.ndarray  # (B,): events of each sample so far


def events_of(times):
    """Times (B, L), of which the latest comes first -> the event that reveals each token: int64 array (B, L). The time
    0 has no event: -1."""
    events = np.stack([np.unique(-row, return_inverse=True)[1] for row in times.numpy()])
    return np.where(times.numpy() > 0, events, -1)


def masked_rows(model, draw, numbers, known):
    """Rows of new samples. Their events are computed on the CPU, so that nothing waits for an accelerator."""
    order_u, code_u = draw(numbers).unbind(1)
    if known is None:
        ids = torch.full(code_u.shape, model.mask_id, device=code_u.device)
    else:
        ids = known[numbers.start : numbers.stop].clone()
    times = model.order_of(order_u.cpu(), (ids == model.mask_id).cpu()).times()
    return Rows(
        ids, code_u.clone(), times.numpy(), events_of(times), np.array(numbers), np.zeros(len(numbers), dtype=np.int64)
    )


@torch.no_grad()
def draw_in_full_batches(model, draw, n, batch_size, temp, on_pass, known=None):
    """Draw samples 0 .. n-1. After each pass that finishes samples, yield their (numbers, ids (m, L)).

    draw: range of numbers -> uniforms (len, 2, L), of the order and of the codes; on_pass: called after each pass with
    the share of a sample's work that it has done, summed over the batch; known (n, L): ids to begin with, with mask_id
    where a token is to be drawn, at least one in each sample.
    """
    rows, waiting = masked_rows(model, draw, range(min(n, batch_size)), known), range(batch_size, n)
    while (rows.done <= rows.events.max(1)).any():
        next_tokens = np.nonzero(rows.events == rows.done[:, None])
        at = tuple(send(torch.from_numpy(index), rows.ids.device) for index in next_tokens)
        rows.ids[at] = model.draw_at(rows.times[next_tokens], model.net(rows.ids, at=at), rows.code_u[at], temp)
        rows.done[:] += 1
        length = rows.events.max(1) + 1
        on_pass((1 / length[rows.done <= length]).sum())
        finished = np.flatnonzero(rows.done == length)
        if not len(finished):
            continue
        yield rows.numbers[finished].tolist(), rows.ids[finished]
        fresh, waiting = waiting[: len(finished)], waiting[len(finished) :]
        if fresh:
            for old, new in zip(rows, masked_rows(model, draw, fresh, known), strict=True):
                old[finished[: len(fresh)]] = new
        if len(fresh) < len(finished) and not model.fixed_shapes:  # no sample is left: the batch shrinks
            kept = np.setdiff1d(np.arange(len(rows.numbers)), finished[len(fresh) :])
            rows = Rows(*(field[kept] for field in rows))


def batches_by_number(finished, n, size):
    """Order what draw_in_full_batches yields: ids (b, L) of samples 0 .. n-1, `size` (at the end fewer) at a time."""
    found: dict[int, Tensor] = {}
    group = range(min(size, n))
    for numbers, ids in finished:
        found.update(zip(numbers, ids, strict=True))
        while group and all(i in found for i in group):
            yield torch.stack([found.pop(i) for i in group])
            group = range(group.stop, min(group.stop + size, n))
