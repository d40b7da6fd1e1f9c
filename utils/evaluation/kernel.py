"""Computes the kernel distance of two sets of features: the squared maximum mean discrepancy with the kernel
(x y / D + 1)^3 (Binkowski et al. 2018). torch-fidelity's KID is the mean over random subsets; the sums over all pairs
have the same expectation and less noise. N and M are numbers of images, D is the width of their features.
"""

from torch import Tensor

from utils.evaluation.prdc import TILE, spans


class KernelDistance:
    """Computes the distance of features from real features (N, D), whose own term is computed once."""

    def __init__(self, real: Tensor) -> None:
        self.real, self.own = real, mean_of_pairs(real)

    def __call__(self, fake: Tensor) -> float:
        """Compute the unbiased estimate of the distance of fake (M, D). It can be below 0."""
        between = kernel_sum(self.real, fake) / (len(self.real) * len(fake))
        return self.own + mean_of_pairs(fake) - 2 * between


def mean_of_pairs(x: Tensor) -> float:
    """Compute the mean of the kernel over all pairs of different rows of x (N, D)."""
    diagonal = float((x.double().square().sum(1) / x.shape[1] + 1).pow(3).sum())
    return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def kernel_sum(a: Tensor, b: Tensor) -> float:
    """Compute the sum of the kernel over all pairs of a row of a (N, D) and a row of b (M, D), in float64."""
    b = b.double()
    return sum(float(((a[rows].double() @ b.T) / a.shape[1] + 1).pow(3).sum()) for rows in spans(len(a), TILE))
