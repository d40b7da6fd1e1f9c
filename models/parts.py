"""More images than the memory holds: a module applied to parts of its batch, whose activations are not kept."""

import torch
from torch.utils.checkpoint import checkpoint


def in_parts(parts, module, *inputs):
    """module(*inputs), where each row of the result depends on the same row of the inputs alone (B, ...).

    With parts > 1 one B/parts rows at a time, in the backward pass too, which computes each part once more: what the
    module keeps for it is kept for one part only. All else of a step sees the whole batch, so that batch norms and
    means over the batch stay what they are.
    """
    if parts == 1:
        return module(*inputs)
    chunks = zip(*(x.chunk(parts) for x in inputs), strict=True)
    # Nothing random happens in these modules: no generator's state need be kept for the second time.
    return torch.cat([checkpoint(module, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
