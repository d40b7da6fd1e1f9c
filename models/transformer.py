"""A pre-norm Transformer over discrete tokens, causal or bidirectional. The code does not depend on the task.

Shapes: B sequences, L tokens, D = n_emb, N heads, V vocabulary, K output classes.
The names of parameters are those of the published checkpoints. Do not rename parameters. models/fast.py has the fast
forms of `forward`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models import fast
from models.layers import attention


@dataclass
class TransformerConfig:
    """The size of a Transformer: tokens, width, heads, layers; dropout of embeddings, attention, residual branches."""

    block_size: int
    bert_n_emb: int
    bert_n_head: int
    bert_n_layers: int
    embd_pdrop: float
    attn_pdrop: float
    resid_pdrop: float


class SelfAttention(nn.Module):
    """Multi-head attention, (B, L, D) -> (B, L, D)."""

    def __init__(self, config, causal):
        super().__init__()
        D, L = config.bert_n_emb, config.block_size
        self.key = nn.Linear(D, D)
        self.query = nn.Linear(D, D)
        self.value = nn.Linear(D, D)
        self.proj = nn.Linear(D, D)
        self.n_head = config.bert_n_head
        self.causal = causal
        self.attn_pdrop = config.attn_pdrop
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.joined = None  # the result of `joined_projection` within `models.fast.frozen`
        if causal:
            # The published checkpoints hold this mask. The code never reads it, because attention has a causal flag.
            self.register_buffer("mask", torch.ones(1, 1, L, L).tril())

    def joined_projection(self):
        """Return weight (3D, D) and bias (3D,) of one linear map that computes query, key and value."""
        parts = (self.query, self.key, self.value)
        return torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])

    def heads(self, x):
        """Compute queries, keys and values by one matrix product: x (B, L, D) -> each (B, N, L, D/N)."""
        B, L, D = x.shape
        qkv = F.linear(x, *(self.joined or self.joined_projection()))
        return qkv.view(B, L, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)

    def attend(self, q, k, v, causal):
        """Weight the values by softmax(q k^T / sqrt(D/N)): q (B, N, Q, D/N) -> (B, Q, D), all heads side by side."""
        out = attention(q, k, v, self.attn_pdrop if self.training else 0.0, causal)
        return out.transpose(1, 2).flatten(2)

    def project(self, x):
        """Map the heads, side by side, to the residual stream: (..., D) -> (..., D)."""
        return self.resid_drop(self.proj(x))

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.project(self.attend(q, k, v, self.causal))


class Block(nn.Module):
    """Pre-norm residual block: attention, then a two-layer perceptron of four times the width."""

    def __init__(self, config, causal):
        super().__init__()
        D = config.bert_n_emb
        self.ln1 = nn.LayerNorm(D)
        self.ln2 = nn.LayerNorm(D)
        self.attn = SelfAttention(config, causal)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D), nn.Dropout(config.resid_pdrop))

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """Computes logits (B, L, K) of ids (B, L).

    With `causal`, a learned start token is put in front and the last id is dropped. Logits [:, i] then depend on
    ids [:, :i] only. Without `causal`, `start_tok` exists, because the published checkpoints hold this parameter, but
    it is not used. Plain DistributedDataParallel would raise an error for an unused parameter.
    The diffusion's time step is not an input, because the number of masked tokens implies the time step.
    """

    def __init__(self, config, vocab_size, n_classes, causal):
        super().__init__()
        D = config.bert_n_emb
        self.block_size = config.block_size
        self.causal = causal
        # Positions start at zero, and all other parameters have PyTorch's initialisation, as in the published model.
        self.pos_emb = nn.Parameter(torch.zeros(1, config.block_size, D))
        self.start_tok = nn.Parameter(torch.zeros(1, 1, D))
        self.tok_emb = nn.Embedding(vocab_size, D)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.blocks = nn.ModuleList(Block(config, causal) for _ in range(config.bert_n_layers))
        self.ln_f = nn.LayerNorm(D)
        self.head = nn.Linear(D, n_classes, bias=False)

    def embed(self, ids):
        """Embed tokens: ids (B, L) -> (B, L, D)."""
        x = self.tok_emb(ids)
        if self.causal:
            x = torch.cat((self.start_tok.expand(len(x), -1, -1), x[:, :-1]), dim=1)
        return self.drop(x + self.pos_emb[:, : x.shape[1]])

    def forward(self, ids, at=None):
        """Compute logits: ids (B, L), L <= block_size -> (B, L, K).

        at: optional positions (rows, columns), each (M,). Only the logits of these positions are computed, (M, K).
        """
        if at is not None:
            return fast.logits_at(self, ids, at)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A checkpoint may leave out the causal masks, because the masks are constants.
        for name, buffer in self.named_buffers():
            if name.endswith("attn.mask"):
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)
