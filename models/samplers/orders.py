"""Orders of sampling: which tokens are revealed at which time.

To add one, decorate a subclass of `Order` (or `KnownOrder`) by `@register_order("name")`, here or in a new file of this
folder. Shapes: B samples, L tokens, K codes; S times, counted down, t = S..1.
"""

import torch
from torch import Tensor

from models.registry import Registry

ORDERS = Registry("order")
register_order = ORDERS.register


class Order:
    """The order of a batch of samples, from uniforms u (B, L) in [0, 1), which are its only source of randomness."""

    def __init__(self, u: Tensor, S: int) -> None:
        self.u, self.S = u, S

    def reveals(self, t: int, masked: Tensor, logits: Tensor, codes: Tensor) -> Tensor:
        """The tokens to reveal at time t: (B, L) bool. After t = 1, all must be known.

        masked (B, L) bool: the tokens that are not known yet; logits (B, L, K): the network's predictions; codes
        (B, L): what was drawn from them.
        """
        raise NotImplementedError


class KnownOrder(Order):
    """An order that does not depend on the network: the constructor sets `times`, (B, L) int64 in 1..S."""

    times: Tensor

    def reveals(self, t: int, masked: Tensor, logits: Tensor, codes: Tensor) -> Tensor:
        return self.times == t


@register_order("random")
class RandomOrder(KnownOrder):
    """The diffusion's own order. At each t, a token that is still masked is revealed with probability 1/t. Its time is
    therefore uniform on {1..S}, independent of the network and of the other tokens."""

    def __init__(self, u: Tensor, S: int) -> None:
        self.times = (u * S).long().clamp(max=S - 1) + 1


@register_order("raster")
class RasterOrder(KnownOrder):
    """Row by row, from left to right."""

    def __init__(self, u: Tensor, S: int) -> None:
        L = u.shape[1]
        self.times = (S - torch.arange(L, device=u.device) * S // L).expand(u.shape)
