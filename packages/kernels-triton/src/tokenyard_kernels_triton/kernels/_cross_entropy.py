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
    """Process the row of one token. A row of scale 0 is not read."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * vocabulary
    factor = tl.load(scale + token)
    target = tl.load(ids + token)
    offset = tl.arange(0, BLOCK)  # [BLOCK]
    log_sum = 0.0
    if factor != 0:
        # Online softmax (arXiv 1805.02867): a maximum and a sum for each position in the block
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + offset
            value = tl.load(row + column, mask=column < vocabulary, other=float("-inf"))
            value = value.to(tl.float32)
            higher = tl.maximum(highest, value, propagate_nan=tl.PropagateNan.ALL)
            # A position that has seen -inf only keeps a sum of 0.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - base) + tl.exp(value - base)
            highest = higher
        top = tl.max(highest, 0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
        of_target = tl.load(row + target).to(tl.float32)
        tl.store(nats + token, (log_sum - of_target) * factor)
    else:
        tl.store(nats + token, 0.0)

    # Gradient
    for first in range(0, vocabulary, BLOCK):
        column = first + offset
        mask = column < vocabulary
        gradient = tl.zeros([BLOCK], tl.float32)
        if factor != 0:
            value = tl.load(row + column, mask=mask, other=float("-inf")).to(tl.float32)
            gradient = (tl.exp(value - log_sum) - (column == target)) * factor
        tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=mask)
