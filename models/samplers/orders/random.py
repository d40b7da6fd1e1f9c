"""Uniformly random: the diffusion's own order."""

from models.samplers.orders.base import KnownOrder, register


@register("random")
class RandomOrder(KnownOrder):
    """With the uniform schedule the diffusion's reverse process (Austin et al. 2021, D3PM): at each t, a token that is
    still masked is revealed with probability 1/t. Its time is therefore uniform on {1..S}, independent of the network
    and of the other tokens. With remasking, each token is a Markov chain of its own (ReMDM with alpha_t = 1 - t/S).
    With another schedule, as many random tokens as the schedule says."""

    def known_scores(self):
        return -self.u[:, 0]

    def scores(self, t, logits, codes):
        return -self.u[:, self.pace.steps - t]

    def sigma(self, t):
        """The probability of remasking at time t: eta min(1, (1 - alpha_{t-1}) / alpha_t)."""
        return self.pace.remask_eta * min(1, (t - 1) / max(self.pace.steps - t, 1))

    def times(self):
        if self.pace.schedule != "uniform":
            return super().times()
        S = self.pace.steps
        times = (self.u[:, 0] * S).long().clamp(max=S - 1) + 1
        return times.masked_fill(~self.unknown, 0)

    def times_of_passes(self):
        return range(self.pace.steps, 0, -1) if self.pace.schedule == "uniform" else super().times_of_passes()

    def reveals(self, t, masked, logits, codes):
        if self.pace.schedule != "uniform":
            return super().reveals(t, masked, logits, codes)
        if not self.pace.remask_eta:
            return self.times() == t
        S = self.pace.steps
        return masked & (self.u[:, S - t] < (1 + self.sigma(t) * (S - t)) / t)

    def remasks(self, t, drawn, u):
        if self.pace.schedule != "uniform":
            return super().remasks(t, drawn, u)
        return drawn & (u < self.sigma(t))
