"""Cross-entropy of logits and their gradient, in place: two reads and one write."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy(
    logits,  # [C, V], replaced by scale * (softmax - onehot)
    ids,  # [C] int64
    scale,  # [C] float32
    nats,  # [C] float32
    vocabulary,  # V
    BLOCK: tl.constexpr,
):
    """Process the row of one token. A row of scale 0 is filled with zeros and never read."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * vocabulary
    row_scale = tl.load(scale + token)
    target = tl.load(ids + token)
    offset = tl.arange(0, BLOCK)  # [BLOCK]
    log_sum = 0.0
    if row_scale != 0:
        # The barriers of the reductions below order this load before the row is overwritten.
        known = (target >= 0) & (target < vocabulary)
        target_logit = tl.load(row + target, mask=known, other=float("nan")).to(tl.float32)

        # Online softmax (arXiv 1805.02867): a maximum and a sum for each position in the block
        block_max = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + offset
            value = tl.load(row + column, mask=column < vocabulary, other=float("-inf"))
            value = value.to(tl.float32)
            new_max = tl.maximum(block_max, value, propagate_nan=tl.PropagateNan.ALL)
            # A position that has seen -inf only keeps a sum of 0.
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            total = total * tl.exp(block_max - base) + tl.exp(value - base)
            block_max = new_max
        row_max = tl.max(block_max, 0)
        log_sum = row_max + tl.log(tl.sum(total * tl.exp(block_max - row_max), 0))
        tl.store(nats + token, (log_sum - target_logit) * row_scale)
    else:
        tl.store(nats + token, 0.0)

    # Gradient
    for first in range(0, vocabulary, BLOCK):
        column = first + offset
        mask = column < vocabulary
        gradient = tl.zeros([BLOCK], tl.float32)
        if row_scale != 0:
            value = tl.load(row + column, mask=mask, other=float("-inf")).to(tl.float32)
            gradient = (tl.exp(value - log_sum) - (column == target)) * row_scale
        tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=mask)
