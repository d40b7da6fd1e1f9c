"""Nearest-neighbour vector quantization (van den Oord et al. 2017, VQ-VAE)."""

import torch
from torch import nn

from models.quantizers.base import Quantized, Quantizer, register

FLAGS = {
    "codebook_init": {
        "default": "uniform",
        "help": "start of the codebook; kmeans: train without quantizing up to "
        "codebook_init_step, then put the codes at centres of latents (nearest, ema, rotation)",
        "choices": ["uniform", "kmeans"],
        "role": "vqgan common",
        "exclusive": True,
    },
    "codebook_restart_steps": {
        "default": 0,
        "help": "steps between moves of unused codes onto present latents; 0: never (nearest, ema, rotation)",
        "role": "vqgan common",
        "min": 0,
        "exclusive": True,
    },
    "codebook_init_step": {
        "default": 500,
        "help": "step of --codebook_init kmeans",
        "min": 1,
        "needs": "codebook_init kmeans",
        "codes_from": True,
    },
    "beta": {"default": 0.25, "help": "weight of the codebook term (nearest, rotation)", "min": 0.0},
}


@register("nearest")
class NearestQuantizer(Quantizer):
    """The closest entry of the codebook replaces each latent vector.

    Shapes: z (B, E, h, w), codebook (K, E).
    """

    def __init__(self, codebook_size, emb_dim, beta, codebook_init, codebook_init_step, codebook_restart_steps):
        super().__init__(codebook_size)
        self.beta = beta
        self.start_step = codebook_init_step if codebook_init == "kmeans" else 0
        self.restart_steps = codebook_restart_steps
        self.embedding = nn.Embedding(codebook_size, emb_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def distances(self, z):
        """Compute squared Euclidean distances, z (B, E, h, w) -> (B*h*w, K). The computation is in float32, also under
        autocast, because in half precision rounding would decide between two close codes."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
            codes = self.embedding.weight.float()
            squares = flat.square().sum(1, keepdim=True) + codes.square().sum(1)
            return torch.addmm(squares, flat, codes.t(), alpha=-2)

    def forward(self, z, step=None, rng=None):
        z = z.float()
        if step is not None and step < self.start_step:
            return self.pass_through(z)
        with torch.no_grad():
            distances = self.distances(z)
            ids = distances.argmin(1).reshape(z.shape[0], *z.shape[2:])
        z_q = self.embed_ids(ids).permute(0, 3, 1, 2)
        # beta weights the codebook term, because the published models were trained in this way. In the VQ-VAE paper,
        # beta weights the commitment term.
        loss = (z_q.detach() - z).square().mean() + self.beta * (z_q - z.detach()).square().mean()
        straight_through = z + (z_q - z).detach()
        return Quantized(straight_through, loss, ids, distances.mean())

    @staticmethod
    def pass_through(z):
        """Return the latents unchanged, as a plain autoencoder does. `forward` calls this before `start_step`."""
        zero = 0.0 * z.sum()  # the zero has a gradient, like every loss
        return Quantized(z, zero, None, zero.detach())

    def codebook_weight(self):
        return self.embedding.weight

    def place_codes(self, vectors, seed):
        """Set the codebook to the k-means centres of latents `vectors` (n, E), n > K."""
        from scipy.cluster.vq import kmeans2  # imported here, because the import is slow and few runs need scipy

        centres, _ = kmeans2(vectors.cpu().double().numpy(), len(self.embedding.weight), minit="++", rng=seed)
        self.embedding.weight.data.copy_(torch.from_numpy(centres))

    @torch.no_grad()
    def restart_codes(self, unused, z, rng):
        """Move the codes `unused` (K,) bool onto random latents of z (B, E, h, w). A code that no latent chooses has no
        gradient and would stay unused (Dhariwal et al. 2020, Jukebox)."""
        vectors = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        chosen = (rng.rand(len(unused)) * len(vectors)).long().clamp(max=len(vectors) - 1)
        self.embedding.weight.data[unused] = vectors[chosen][unused].to(self.embedding.weight)

    def encode(self, z):
        return self.distances(z).argmin(1).reshape(z.shape[0], *z.shape[2:])

    def embed_ids(self, ids):
        return self.embedding(ids)
