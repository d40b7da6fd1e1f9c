"""Each latent gets its nearest code, and moving averages of the latents update the codebook.

The method is that of van den Oord et al. 2017, appendix A.1.
"""

import torch

from models.quantizers.base import Quantized, register
from models.quantizers.nearest import NearestQuantizer
from utils.core import distributed
from utils.core.seed import StepRandom

FLAGS = {
    "codebook_decay": {"default": 0.99, "help": "decay of the codebook's averages (ema)", "min": 0.0, "max": 1.0},
    "codebook_init": {},
    "codebook_init_step": {},
    "codebook_restart_steps": {},
}
LEAST = 1e-20  # the averaged number of uses of a code never falls below this value, because the update divides by it


@register("ema")
class EMAQuantizer(NearestQuantizer):
    """Each code is the moving average of the latents that chose the code. The loss is the commitment term alone.

    Let n be the uses of a code in a batch, and s the sum of the latents that chose the code. The paper's update is
    N <- decay N + (1 - decay) n, m <- decay m + (1 - decay) s, e <- m / N. Because m = N e, only N and e are kept.
    """

    cluster_size: torch.Tensor

    def __init__(
        self,
        codebook_size: int,
        emb_dim: int,
        codebook_decay: float,
        codebook_init: str,
        codebook_init_step: int,
        codebook_restart_steps: int,
    ) -> None:
        super().__init__(codebook_size, emb_dim, 0.0, codebook_init, codebook_init_step, codebook_restart_steps)
        self.decay = codebook_decay
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones(codebook_size))

    def forward(self, z: torch.Tensor, step: int | None = None, rng: StepRandom | None = None) -> Quantized:
        quantized = super().forward(z, step, rng)
        if self.training and quantized.ids is not None:
            self.update(z, quantized.ids)
        return quantized

    @torch.no_grad()
    def update(self, z: torch.Tensor, ids: torch.Tensor) -> None:
        """Move each code towards the latents that chose the code, in all processes. z (B, E, h, w), ids (B, h, w)."""
        codes, flat = self.embedding.weight, z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        n, s = torch.zeros_like(self.cluster_size), torch.zeros_like(codes)
        n.index_add_(0, ids.flatten(), torch.ones_like(flat[:, 0]))
        s.index_add_(0, ids.flatten(), flat)
        n, s = distributed.all_reduce_sum(n), distributed.all_reduce_sum(s)
        self.cluster_size.lerp_(n, 1 - self.decay).clamp_(min=LEAST)
        codes += (1 - self.decay) * (s - n[:, None] * codes) / self.cluster_size[:, None]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Start the averages afresh if the checkpoint of another quantizer has a codebook but no averages."""
        state_dict.setdefault(f"{prefix}cluster_size", torch.ones_like(self.cluster_size))
        super()._load_from_state_dict(state_dict, prefix, *args)
