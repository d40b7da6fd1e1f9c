"""Fast forms of the functions in models/transformer.py. Both forms give the same results up to rounding. The tests
tests/models/test_samplers.py and tests/models/test_plain.py compare the results.

Shapes: B sequences, L tokens, D width, N heads of width d, K output classes. `net`: a models.transformer.Transformer.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


def logits_at(net, ids, at):
    """Return net(ids)[at]. The last block and the head compute only the positions `at`: (rows, columns), each (M,)."""
    x = net.embed(ids)
    *blocks, last = net.blocks
    for block in blocks:
        x = block(x)
    attn, positions = last.attn, rounded_up(at)
    found = attn.attend(*attn.heads(last.ln1(x)), attn.causal)
    x = after_attention(last, x[positions], found[positions])
    return net.head(net.ln_f(x))[: len(at[0])]


def after_attention(block, x, found):
    """Compute the part of a block after its attention. found: the output of the heads, (..., D). torch.compile never
    compiles this function, because the number of positions differs at each call."""
    x = x + block.attn.project(found)
    return x + block.mlp(block.ln2(x))


def rounded_up(at):
    """Pad positions (rows, columns), each (M,), with the position (0, 0) to a round number.

    Each M gives matrix products of another shape. On a CPU in bf16 oneDNN keeps up to 10 MB for each shape;
    torch.compile and cuBLAS choose a kernel for each shape. Padding limits the number of shapes.
    """
    M = len(at[0])
    step = 32 if M <= 256 else 256
    return tuple(F.pad(index, (0, -M % step)) for index in at)


class CachedDecoder:
    """Computes the logits of a causal Transformer token by token, and keeps the keys and values of earlier tokens."""

    def __init__(self, net):
        self.net, self.position = net, 0
        self.kept = []  # the keys and values of each block, (2, B, N, block_size, d)

    def next_logits(self, ids):
        """Compute the logits of the next token: ids (B, i) -> (B, K). ids: all tokens so far, i = 0, 1, ..."""
        net, i = self.net, self.position
        x = net.tok_emb(ids[:, i - 1 :]) if i > 0 else net.start_tok.expand(len(ids), -1, -1)
        x = x + net.pos_emb[:, i : i + 1]
        for number, block in enumerate(net.blocks):
            q, k, v = block.attn.heads(block.ln1(x))
            if i == 0:
                self.kept.append(k.new_empty(2, *k.shape[:2], net.block_size, k.shape[-1]))
            keys, values = self.kept[number]
            keys[:, :, i : i + 1], values[:, :, i : i + 1] = k, v
            found = block.attn.attend(q, keys[:, :, : i + 1], values[:, :, : i + 1], causal=False)
            x = after_attention(block, x, found)
        self.position += 1
        return net.head(net.ln_f(x))[:, 0]


@contextlib.contextmanager
def frozen(net):
    """A context for sampling with torch.no_grad, in which the weights of `net` must not change. The joined projections
    and the casts to autocast's number format are computed once, not in every pass.

    Sampling makes many passes over few tokens. Without this context most of the time would be spent on joining and
    casting weights.
    """
    weights = [p for m in net.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)]
    device = weights[0].device.type if weights else "cpu"
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    attentions = [m for m in net.modules() if hasattr(m, "joined_projection")]
    kept = [(p.data, p.grad) for p in weights]
    try:
        for p in weights:
            p.grad = None  # torch.compile refuses a weight whose gradient has another number format
            p.data = p.data.to(dtype)  # the dtype None changes nothing
        with torch.no_grad():
            for module in attentions:
                module.joined = module.joined_projection()
        yield
    finally:
        for p, (data, gradient) in zip(weights, kept, strict=True):
            p.data, p.grad = data, gradient
        for module in attentions:
            module.joined = None
