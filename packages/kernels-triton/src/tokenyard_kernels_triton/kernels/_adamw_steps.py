"""The steps of parameters, and the bias corrections of AdamW, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_steps(
    steps,  # [parameters] float32, increased by 1
    has_gradient,  # [parameters] float32: 1, or 0 for parameters that are not updated
    scale,  # []: a factor of all gradients; nothing is counted if it is not finite
    step_sizes,  # [parameters] float32, written: learning rate / correction of the first moment
    corrections,  # [parameters] float32, written: root of the correction of the second moment
    count,
    learning_rate,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count a step. Corrections are 1 - beta^step, in float64."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    finite = tl.abs(tl.load(scale)) < float("inf")
    step = tl.load(steps + index, mask=mask, other=1.0)
    step += tl.where(finite, tl.load(has_gradient + index, mask=mask, other=0.0), 0.0)
    tl.store(steps + index, step, mask=mask)
    wide = step.to(tl.float64)
    first = 1 - tl.exp(wide * LOG_BETA1)
    second = 1 - tl.exp(wide * LOG_BETA2)
    tl.store(step_sizes + index, (learning_rate / first).to(tl.float32), mask=mask)
    tl.store(corrections + index, tl.sqrt(second).to(tl.float32), mask=mask)
