"""Uniformly random: the diffusion's own order."""

from models.samplers.orders.base import KnownOrder, register


@register("random")
class RandomOrder(KnownOrder):
    """With the uniform schedule the diffusion's reverse process (Austin et al. 2021, D3PM): at each t, a token that is
    still masked is revealed with probability 1/t. Its time is therefore uniform on {1..S}, independent of the network
    and of the other tokens. With another schedule, as many random tokens as the schedule says."""

    def known_scores(self):
        return -self.u[:, 0]

    def times(self):
        if self.pace.schedule != "uniform":
            return super().times()
        S = self.pace.steps
        times = (self.u[:, 0] * S).long().clamp(max=S - 1) + 1
        return times.masked_fill(~self.unknown, 0)

    def times_of_passes(self):
        return range(self.pace.steps, 0, -1) if self.pace.schedule == "uniform" else super().times_of_passes()

    def reveals(self, t, masked, logits, codes):
        return self.times() == t if self.pace.schedule == "uniform" else super().reveals(t, masked, logits, codes)
