"""Runs the backward pass in float32, bf16 or fp16 (with loss scaling). The class Output combines several losses of one
output of a network."""

from typing import Any

import torch

from utils.core import distributed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_has_bf16() -> bool:
    """Return True if the processor multiplies bf16 in hardware. Otherwise PyTorch emulates bf16, which is slow."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def resolve_dtype(amp_dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of --amp_dtype. 'auto' selects fp16 on CUDA devices without bf16, and otherwise bf16."""
    if amp_dtype != "auto":
        return DTYPES[amp_dtype]
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


class Precision:
    """Use `with precision.autocast(): ...` around the forward pass and `precision.step(...)` to update.

    With fp16 the loss is scaled. An update whose gradients overflow is skipped and counted (`skipped`, a tensor on the
    device). In other formats scaling is off and costs nothing.
    """

    def __init__(self, enabled: bool, amp_dtype: str, device: torch.device) -> None:
        self.device = device
        self.enabled = enabled
        self.dtype = resolve_dtype(amp_dtype, device) if enabled else torch.float32
        self.scaling = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.scaling)
        self.skipped = torch.zeros((), device=device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)

    def scale(self, value: torch.Tensor) -> torch.Tensor:
        """Return value times the loss scale."""
        return self.scaler.scale(value)

    def unscaled(self, value: torch.Tensor) -> torch.Tensor:
        """Return value divided by the loss scale. The scale stays on the device, because reading it would wait."""
        return value / self.scale(value.new_ones(())) if self.scaling else value

    def step(self, optimiser: torch.optim.Optimizer) -> None:
        """Unscale the gradients and update, or skip the update if they overflowed."""
        self.scaler.step(optimiser)
        if self.scaling:
            self.skipped += sum(f.to(self.device) for f in self.scaler._found_inf_per_device(optimiser).values())

    def update(self) -> None:
        """Adapt the loss scale. Call it once per step, after the last optimiser."""
        self.scaler.update()

    def describe(self) -> str:
        return {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def state_dict(self) -> dict[str, Any]:
        return dict(scaler=self.scaler.state_dict(), skipped=self.skipped)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaling and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.copy_(state["skipped"])


class Output:
    """An output of a network with several losses. The gradient of each loss is computed with respect to the output
    only.

    A weighted sum of these gradients then goes through the network in a single backward pass. The adaptive weight
    depends on the same gradients. Therefore LPIPS and the discriminator need only one backward pass per step instead of
    two. The loss scale multiplies all gradients of losses.
    """

    def __init__(self, tensor: torch.Tensor, precision: Precision) -> None:
        self.tensor, self.precision = tensor, precision
        self.value = tensor.detach().requires_grad_()  # the input of the losses

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a loss with respect to `value`."""
        return torch.autograd.grad(self.precision.scale(loss), self.value)[0]

    def gradients_at(self, weight: torch.Tensor, *gradients: torch.Tensor) -> Any:
        """Convert gradients with respect to the output to gradients with respect to a weight of the last layer. The
        result is one stacked tensor. Each gradient is a vector-Jacobian product through one layer. The gradients are
        averaged over the processes, and the loss scale is removed."""
        rows = [torch.autograd.grad(self.tensor, weight, g, retain_graph=True)[0] for g in gradients]
        return self.precision.unscaled(distributed.all_reduce_mean(torch.stack(rows)))

    def backward(self, gradient: torch.Tensor, loss: torch.Tensor) -> None:
        """Back-propagate through the network: `gradient` from the output, and a further loss, in one pass."""
        torch.autograd.backward([self.tensor, self.precision.scale(loss)], [gradient, None])
