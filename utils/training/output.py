"""Gradients of losses that share one network output. The network is back-propagated once."""

from typing import Any

import torch

from utils.core import distributed
from utils.training.amp import Precision


class Output:
    """An output of a network whose losses are differentiated one by one, down to the output.

    A weighted sum of these gradients then goes through the network in a single backward pass. So LPIPS and the
    discriminator are back-propagated once a step, not twice, although the weight depends on the gradients.
    All gradients of losses are multiplied by the loss scale (utils.training.amp).
    """

    def __init__(self, tensor: torch.Tensor, precision: Precision) -> None:
        self.tensor, self.precision = tensor, precision
        self.value = tensor.detach().requires_grad_()  # what the losses are computed from

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """The gradient of a loss of `value` with respect to it."""
        return torch.autograd.grad(self.precision.scale(loss), self.value)[0]

    def gradients_at(self, weight: torch.Tensor, *gradients: torch.Tensor) -> Any:
        """Gradients with respect to the output -> those with respect to a weight of the last layer, stacked: a
        vector-Jacobian product through one layer. They are means over the processes, without the loss scale."""
        rows = [torch.autograd.grad(self.tensor, weight, g, retain_graph=True)[0] for g in gradients]
        return self.precision.unscaled(distributed.all_reduce_mean(torch.stack(rows)))

    def backward(self, gradient: torch.Tensor, loss: torch.Tensor) -> None:
        """Back-propagate this gradient of the output, and another loss of the network."""
        torch.autograd.backward([self.tensor, self.precision.scale(loss)], [gradient, None])
