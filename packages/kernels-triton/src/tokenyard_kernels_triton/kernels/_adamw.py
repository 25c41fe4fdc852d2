"""AdamW of many tensors in one launch, with the dtypes of weights, gradients and states apart."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pointer(row, column, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update(
    row,  # [5] int64: the addresses of one tensor
    first,  # the first element of the block
    size,
    step_size,
    correction,
    factor,
    decay,
    beta1,
    beta2,
    eps,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASTER: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a block. Without a mask, 16 bytes are accessed at a time."""
    offset = tl.arange(0, BLOCK)  # [BLOCK]
    mask = first + offset < size if MASKED else None
    gradients = _pointer(row, 1, GRADIENT, ALIGNED) + first + offset
    masters = _pointer(row, 2, MASTER, ALIGNED) + first + offset
    first_moments = _pointer(row, 3, MOMENT, ALIGNED) + first + offset
    second_moments = _pointer(row, 4, MOMENT, ALIGNED) + first + offset

    # Moments
    gradient = tl.load(gradients, mask=mask).to(MASTER) * factor
    m = tl.load(first_moments, mask=mask).to(MASTER)
    v = tl.load(second_moments, mask=mask).to(MASTER)
    m += (1 - beta1) * (gradient - m)
    v = beta2 * v + (1 - beta2) * gradient * gradient
    tl.store(first_moments, m.to(MOMENT), mask=mask)
    tl.store(second_moments, v.to(MOMENT), mask=mask)

    # Weight
    master = tl.load(masters, mask=mask) * decay
    master -= step_size * m / (tl.sqrt(v) / correction + eps)
    tl.store(masters, master, mask=mask)
    if HAS_MASTER:
        weights = _pointer(row, 0, WEIGHT, ALIGNED) + first + offset
        tl.store(weights, master.to(WEIGHT), mask=mask)


@triton.jit
def adamw(
    addresses,  # [tensors, 5] int64: weight, gradient, master, first and second moment
    sizes,  # [tensors] int64
    block_tensor,  # [blocks] int32: the tensor of each block
    block_index,  # [blocks] int32: its number within the tensor
    step_sizes,  # [tensors]: learning rate / bias correction of the first moment
    corrections,  # [tensors]: square root of the bias correction of the second moment
    scale,  # []: a factor of all gradients; nothing changes if it is not finite
    decay,  # 1 - learning rate * weight decay
    beta1,
    beta2,
    eps,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASTER: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a block of a tensor. Without a master, its address is that of the weight."""
    block = tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    factor = tl.load(scale)
    row = addresses + tensor * 5
    # A tensor without a gradient has the address 0.
    has_gradient = tl.load(row + 1) != 0
    if has_gradient & (tl.abs(factor) < float("inf")):
        first = tl.load(block_index + block).to(tl.int64) * BLOCK
        size = tl.load(sizes + tensor)
        step_size = tl.load(step_sizes + tensor)
        correction = tl.load(corrections + tensor)
        for masked in tl.static_range(2):
            if (first + BLOCK > size) == masked:
                _update(
                    row,
                    first,
                    size,
                    step_size,
                    correction,
                    factor,
                    decay,
                    beta1,
                    beta2,
                    eps,
                    WEIGHT,
                    GRADIENT,
                    MASTER,
                    MOMENT,
                    HAS_MASTER,
                    ALIGNED and masked == 0,
                    masked,
                    BLOCK,
                )
