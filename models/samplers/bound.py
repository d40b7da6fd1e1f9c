"""The absorbing diffusion's bound as a mean over the number of masked tokens, and how to sample that mean evenly.

In the bound sum_{t=1..T} E[CE(S)] / t, S is the set of tokens masked at t. It depends on t only through the number of
masked tokens: given m = |S|, S is uniform over the sets of m tokens. So the bound equals W E[CE(S) / m], where m is
drawn in proportion to w_m = m sum_t P(m | t) / t, and W = sum_m w_m.

Shapes: B samples, L tokens, P passes, T = total_steps.
"""

import torch

from models.samplers.base import invert_cdf


def count_weights(T, L):
    """w_m for m = 1..L, (L,) float64. Their sum is L."""
    # P(m | t) is binomial, and m Binomial(m; L, t/T) / t = (L/T) Binomial(m - 1; L - 1, t/T).
    others = torch.arange(L, dtype=torch.float64)  # m - 1
    rest = L - 1 - others
    log_choose = torch.lgamma(others.new_tensor(L)) - torch.lgamma(others + 1) - torch.lgamma(rest + 1)
    total = torch.zeros_like(others)
    for rate in torch.arange(1, T + 1, dtype=torch.float64) / T:
        total += (log_choose + torch.xlogy(others, rate) + torch.xlogy(rest, 1 - rate)).exp()
    return total * (L / T)


def stratified_counts(weights, u, passes):
    """Numbers of masked tokens drawn in proportion to weights (L,), one from each P-th of their distribution.

    u (B,) uniforms in [0, 1), one per sample for all of its passes. Returns (B, P) int64 on the CPU, ascending.
    """
    # On the CPU because not every accelerator has float64.
    strata = (torch.arange(passes) + u.cpu().double()[:, None]) / passes
    return invert_cdf(weights, strata) + 1


def balanced_masks(counts, order):
    """Yield P masks (B, L) bool of counts (B, P) tokens, so that all tokens get a similar total weight.

    A token in a mask of m tokens gets the weight 1/m. Each mask takes the tokens with the least weight so far
    (counts should ascend, so that the small weights come last and fill the gaps). order (B, L): permutations.
    If they are uniformly random, so is each mask among the sets of its size.
    """
    weight = torch.zeros(order.shape, device=order.device)
    for m in counts.to(order.device)[:, :, None].unbind(1):
        rank = weight.argsort(dim=1, stable=True).argsort(1)
        mask = rank < m
        weight += mask / m
        yield mask.gather(1, order)
