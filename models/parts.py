"""For batches larger than the memory: apply a module to parts of its batch, without keeping activations."""

import torch
from torch.utils.checkpoint import checkpoint


def in_parts(parts, module, *inputs):
    """Return module(*inputs), inputs (B, ...). Each row of the result must depend only on the same row of the inputs.

    With parts > 1, the forward and the backward pass process B/parts rows at a time. The backward pass computes each
    part once more, so activations are kept for one part only. The rest of the step sees the complete batch, so batch
    norms and means over the batch do not change.
    """
    if parts == 1:
        return module(*inputs)
    chunks = zip(*(x.chunk(parts) for x in inputs), strict=True)
    # These modules use no randomness, so the generators' states need not be saved for the second computation.
    return torch.cat([checkpoint(module, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
