"""A pre-norm Transformer over discrete tokens; causal or bidirectional, independent of the task.

Shapes: B sequences, L tokens, D = n_emb, N heads, V vocabulary, K output classes.
Parameter names are those of the published checkpoints: do not rename.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import attention


class SelfAttention(nn.Module):
    """Multi-head attention. It has three named projections but computes them as one matrix product."""

    def __init__(self, n_emb, n_head, block_size, causal, attn_pdrop, resid_pdrop):
        super().__init__()
        self.key = nn.Linear(n_emb, n_emb)
        self.query = nn.Linear(n_emb, n_emb)
        self.value = nn.Linear(n_emb, n_emb)
        self.proj = nn.Linear(n_emb, n_emb)
        self.n_head = n_head
        self.causal = causal
        self.attn_pdrop = attn_pdrop
        self.resid_drop = nn.Dropout(resid_pdrop)
        self.joined = None  # the result of `joined_projection` within `frozen`
        if causal:
            # Never read: attention uses its own causal flag. The published checkpoints hold it.
            self.register_buffer("mask", torch.ones(1, 1, block_size, block_size).tril())

    def joined_projection(self):
        """Weight (3D, D) and bias (3D,) of query, key and value as one linear map."""
        parts = (self.query, self.key, self.value)
        return torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])

    def forward(self, x, cache=None):
        """x (B, L, D) -> (B, L, D), before `project`. With a cache, x continues the tokens in the cache."""
        B, L, D = x.shape
        qkv = F.linear(x, *(self.joined or self.joined_projection())).view(B, L, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, N, L, D/N)
        causal = self.causal
        if cache is not None:
            k, v = cache.extend(k, v)
            causal = causal and L > 1
        dropout = self.attn_pdrop if self.training else 0.0
        out = attention(q, k, v, dropout, causal)
        return out.transpose(1, 2).reshape(B, L, D)

    def project(self, x):
        """Project the heads' outputs, (..., D), for the residual stream."""
        return self.resid_drop(self.proj(x))


@contextlib.contextmanager
def frozen(net):
    """Context in which the weights of `net` do not change (use it with torch.no_grad). The joined projections and the
    casts to autocast's number format are computed once instead of in every pass.

    Sampling makes many passes over few tokens; without this it would spend more time on the weights than on the tokens.
    """
    weights = [p for m in net.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)]
    device = weights[0].device.type if weights else "cpu"
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    attentions = [m for m in net.modules() if isinstance(m, SelfAttention)]
    kept = [p.data for p in weights]
    try:
        for p in weights:
            p.data = p.data.to(dtype)  # None: as it is
        for module in attentions:
            module.joined = module.joined_projection()
        yield
    finally:
        for p, data in zip(weights, kept, strict=True):
            p.data = data
        for module in attentions:
            module.joined = None


def rounded_up(at):
    """Positions (rows, columns), each (M,), padded with the position (0, 0) to a round number.

    Each M gives matrix products of another shape: on a CPU in bf16 oneDNN keeps up to 10 MB for each shape, and
    torch.compile and cuBLAS choose a kernel for each. Padding limits the number of shapes.
    """
    M = len(at[0])
    step = 32 if M <= 256 else 256
    return tuple(F.pad(index, (0, -M % step)) for index in at)


class KeyValueCache:
    """Keys and values of one layer for the tokens seen so far, in buffers of full length."""

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0
        self.k = self.v = None

    def extend(self, k, v):
        """Append k, v (B, N, L, D/N); return all seen so far."""
        if self.k is None:
            B, N, _, d = k.shape
            self.k, self.v = k.new_empty(B, N, self.max_length, d), v.new_empty(B, N, self.max_length, d)
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Block(nn.Module):
    """Pre-norm residual block: attention, then a two-layer perceptron of four times the width."""

    def __init__(self, n_emb, n_head, block_size, causal, attn_pdrop, resid_pdrop):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_emb)
        self.ln2 = nn.LayerNorm(n_emb)
        self.attn = SelfAttention(n_emb, n_head, block_size, causal, attn_pdrop, resid_pdrop)
        self.mlp = nn.Sequential(
            nn.Linear(n_emb, 4 * n_emb), nn.GELU(), nn.Linear(4 * n_emb, n_emb), nn.Dropout(resid_pdrop)
        )

    def forward(self, x, cache=None, at=None):
        """x (B, L, D) -> (B, L, D), or only (M, D) at the positions `at`, (rows, columns), if given."""
        found = self.attn(self.ln1(x), cache)
        if at is not None:
            x, found = x[at], found[at]
        x = x + self.attn.project(found)
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """ids (B, L) -> logits (B, L, K).

    With `causal`, a learned start token is put in front and the last id is dropped, so that logits
    [:, i] depend on ids [:, :i] only. Without `causal`, `start_tok` exists (the published checkpoints hold
    it) but is not used; plain DistributedDataParallel would raise an error for such a parameter.
    The diffusion's time step is not an input: the number of masked tokens implies it.
    """

    def __init__(
        self,
        vocab_size,
        n_classes,
        block_size,
        n_emb,
        n_head,
        n_layers,
        causal=False,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    ):
        super().__init__()
        self.block_size = block_size
        self.causal = causal
        # PyTorch's default initialisation throughout, zeros for positions: as published.
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_emb))
        self.start_tok = nn.Parameter(torch.zeros(1, 1, n_emb))
        self.tok_emb = nn.Embedding(vocab_size, n_emb)
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks = nn.ModuleList(
            Block(n_emb, n_head, block_size, causal, attn_pdrop, resid_pdrop) for _ in range(n_layers)
        )
        self.ln_f = nn.LayerNorm(n_emb)
        self.head = nn.Linear(n_emb, n_classes, bias=False)

    def forward(self, ids, at=None):
        """ids (B, L), L <= block_size -> logits (B, L, K).

        at: optional (rows, columns), each (M,): compute the logits of these positions only, (M, K).
        """
        x = self.tok_emb(ids)
        if self.causal:
            x = torch.cat((self.start_tok.expand(len(x), -1, -1), x[:, :-1]), dim=1)
        x = self.drop(x + self.pos_emb[:, : x.shape[1]])
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        if at is None:
            return self.head(self.ln_f(last(x)))
        x = last.forward(x, at=rounded_up(at))  # not compiled: the number of positions differs each time
        return self.head(self.ln_f(x))[: len(at[0])]

    def new_cache(self):
        return [KeyValueCache(self.block_size) for _ in self.blocks]

    def next_logits(self, last_ids, cache, batch_size):
        """One step of causal decoding: logits (B, K) after the tokens in the cache and last_ids (B,).

        last_ids is None at the first step, which reads the start token.
        """
        position = cache[0].length
        if last_ids is None:
            x = self.start_tok.expand(batch_size, -1, -1)
        else:
            x = self.tok_emb(last_ids)[:, None]
        x = x + self.pos_emb[:, position : position + 1]
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x = block.forward(x, layer_cache)  # not compiled: the length of the cache differs at every step
        return self.head(self.ln_f(x))[:, 0]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The causal masks are constants: a checkpoint may leave them out.
        for name, buffer in self.named_buffers():
            if name.endswith("attn.mask"):
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args)
