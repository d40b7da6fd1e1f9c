"""Each latent gets its nearest code; the gradient is that of the rotation trick.

The method is that of Fifty et al. 2024, arXiv 2410.06424.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from models.layers import in_layout_of
from models.quantizers.base import Quantized, register
from models.quantizers.nearest import NearestQuantizer
from utils.core.seed import StepRandom

FLAGS = {"beta": {}, "codebook_init": {}, "codebook_init_step": {}, "codebook_restart_steps": {}}  # type: ignore[var-annotated]
EPS = 1e-6


@register("rotation")
class RotationQuantizer(NearestQuantizer):
    """The forward pass is that of `nearest`. A rotation and a scaling map the latent to its code. The backward pass
    applies the same rotation and scaling to the gradient. The gradient therefore depends on the position of the latent
    in the code's region."""

    def forward(self, z: torch.Tensor, step: int | None = None, rng: StepRandom | None = None) -> Quantized:
        quantized = super().forward(z, step, rng)
        if quantized.ids is None:
            return quantized
        codes = in_layout_of(z, self.embed_ids(quantized.ids).permute(0, 3, 1, 2)).detach()
        return replace(quantized, z_q=rotate(z.float(), codes))


def rotate(z: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the value `codes`, computed as (|codes| / |z|) R z. R is the rotation from z to the code. For the
    gradient, R and the factor are constants (section 4.2 of the paper).

    z, codes: (B, E, ...), float32; the vectors are in dimension 1.
    """
    with torch.no_grad():
        scale = codes.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp(min=EPS)
        start, end = F.normalize(z, dim=1), F.normalize(codes, dim=1)
        middle = F.normalize(start + end, dim=1)

    def along(direction):
        return (direction * z).sum(1, keepdim=True)

    rotated = scale * (z - 2 * along(middle) * middle + 2 * along(start) * end)
    return rotated + (codes - rotated).detach()  # the value is exactly the code, even if no rotation is defined
