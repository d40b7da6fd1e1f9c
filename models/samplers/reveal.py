"""Sampling of the absorbing diffusion: when each token is revealed, and how to keep the batch full.

For t = S..1, each token that is still masked is revealed with probability 1/t. The reveal time of each token is
therefore uniform on {1..S}, independent of the network. So all times are drawn first, and the network runs only at
times at which something is revealed, each sample at its own next event. This takes S (1 - (1 - 1/S)^L) passes on
average, 162 for S = L = 256. The distribution of the samples is exactly that of visiting all S steps.

Shapes: B samples at a time, L tokens, S sampling steps.
"""

import numpy as np
import torch

from models.samplers.base import draw_codes


def reveal_times(reveal_u, S):
    """Uniforms (B, L) in [0, 1) -> the time in {1..S} at which each token is revealed, int64 (B, L)."""
    return (reveal_u * S).long().clamp(max=S - 1) + 1


def reveal_events(reveal_u, S):
    """Uniforms (B, L) -> the event (0, 1, ... of its sample) that reveals each token: int64 array (B, L)."""
    times, order = reveal_times(reveal_u.cpu(), S).sort(dim=1, descending=True)
    is_next = torch.zeros_like(times)
    is_next[:, 1:] = times[:, 1:] != times[:, :-1]
    return torch.empty_like(order).scatter_(1, order, is_next.cumsum(1)).numpy()


class Slots:
    """The samples that are being drawn: B rows of ids on the device, and the progress of each row on the CPU.

    draw: range of numbers -> uniforms (len, 2, L), for the reveal times and for the codes. Samples 0 .. n-1 take the
    free slots in order. The reveal times are computed before the network runs, so that nothing waits for an
    accelerator.
    """

    def __init__(self, draw, n, n_slots, S, mask_id):
        self.draw, self.n, self.S, self.mask_id = draw, n, S, mask_id
        numbers = range(min(n, n_slots))
        u = draw(numbers)
        self.ids = torch.full(u[:, 1].shape, mask_id, dtype=torch.int64, device=u.device)
        self.code_u, self.events = u[:, 1].clone(), reveal_events(u[:, 0], S)
        self.numbers, self.done = np.array(numbers), np.zeros(len(numbers), dtype=np.int64)
        self.next = len(numbers)

    def at(self):
        """(rows, columns) of the tokens that are revealed next."""
        at = np.nonzero(self.events == self.done[:, None])
        return tuple(torch.from_numpy(x).to(self.ids.device, non_blocking=True) for x in at)

    def length(self):
        """Events of each sample, (B,)."""
        return self.events.max(1) + 1

    def take_finished(self):
        """After a pass, return (numbers, ids (m, L)) of the finished samples. New samples take their slots; if none is
        left, the batch shrinks."""
        self.done += 1
        finished = np.flatnonzero(self.done >= self.length())
        if not len(finished):
            return [], None
        numbers, ids = self.numbers[finished].tolist(), self.ids[torch.from_numpy(finished)]
        fresh = range(self.next, min(self.next + len(finished), self.n))
        if fresh:
            slots, u = finished[: len(fresh)], self.draw(fresh)
            self.ids[slots], self.code_u[slots] = self.mask_id, u[:, 1]
            self.events[slots], self.numbers[slots], self.done[slots] = reveal_events(u[:, 0], self.S), fresh, 0
            self.next = fresh.stop
        if len(fresh) < len(finished):
            kept = np.setdiff1d(np.arange(len(self.numbers)), finished[len(fresh) :])
            self.ids, self.code_u = self.ids[kept], self.code_u[kept]
            self.events, self.numbers, self.done = self.events[kept], self.numbers[kept], self.done[kept]
        return numbers, ids


@torch.no_grad()
def reveal(denoise, slots, temp=1.0, on_pass=None):
    """Draw all samples of `slots`. After each pass that finishes samples, yield their (numbers, ids (m, L)).

    denoise: (ids (B, L), at=(rows, columns)) -> logits at these tokens; on_pass: called after each pass with the
    share of a sample's work that it has done, summed over the batch.
    """
    while len(slots.numbers):
        at = slots.at()
        slots.ids[at] = draw_codes(denoise(slots.ids, at=at), slots.code_u[at], temp)
        if on_pass:
            on_pass((1 / slots.length()).sum())
        numbers, ids = slots.take_finished()
        if numbers:
            yield numbers, ids


def in_order(finished, n, size):
    """Order the results of `reveal`: yield ids (b, L) of samples 0 .. n-1, `size` at a time (the last time fewer)."""
    found, group = {}, range(min(size, n))
    for numbers, ids in finished:
        found.update(zip(numbers, ids, strict=True))
        while group and all(i in found for i in group):
            yield torch.stack([found.pop(i) for i in group])
            group = range(group.stop, min(group.stop + size, n))
