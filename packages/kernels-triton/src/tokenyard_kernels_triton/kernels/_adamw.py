"""AdamW of many tensors in one launch, with the dtypes of weights, gradients and states apart."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pointer(row, column, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _decode(codes, SIGNED: tl.constexpr):
    """Return the values of codes in the dynamic map of Dettmers et al. 2021 (arXiv 2110.02861).

    Decade i has 2^i values if there is a sign, else twice as many: centres of equal cells of
    [0.1, 1] * 10^(i - 6). With m = code (+ 1), the exponent of m + 1/2 counts decades, and its
    mantissa is 1 + the place in the decade.
    """
    codes = codes.to(tl.int32)
    magnitude = codes
    last: tl.constexpr = 128 if SIGNED else 255
    offset: tl.constexpr = 0 if SIGNED else 1
    if SIGNED:
        magnitude = tl.where(codes > 128, codes - 128, codes)
    bits = (magnitude + offset).to(tl.float32) + 0.5
    bits = bits.to(tl.int32, bitcast=True)
    decade = ((bits >> 23) - 127 - offset).to(tl.float32)
    place = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1
    value = tl.exp2((decade - 6) * 3.321928094887362) * (0.1 + 0.9 * place)  # log2(10)
    value = tl.where(magnitude == last, 1.0, tl.where(magnitude == 0, 0.0, value))
    return tl.where(codes > 128, -value, value) if SIGNED else value


@triton.jit
def _encode(x, SIGNED: tl.constexpr):
    """Return the codes of the nearest values to x in [-1, 1]; without a sign, 0 only for 0."""
    size = tl.abs(x)
    first: tl.constexpr = 1.0 if SIGNED else 2.0  # values in decade 0
    last: tl.constexpr = 128 if SIGNED else 255
    # Between decades i and i + 1 is the middle of their neighbouring values
    decade = tl.zeros_like(size)
    for i in tl.static_range(6):
        middle = 10.0 ** (i - 6) * (1 + 0.9 / (first * 2.0**i))
        decade += (size >= middle).to(tl.float32)
    place = (size * tl.exp2((6 - decade) * 3.321928094887362) - 0.1) / 0.9
    place = tl.minimum(tl.maximum(place, 0.0), 0.9999)
    code = ((1 + place) * tl.exp2(decade) * first).to(tl.int32) - (first - 1)
    code = code.to(tl.int32)
    code = tl.where(size >= 1 - 0.225 / (64 * first), last, code)
    if SIGNED:
        code = tl.where(size < 0.275e-6, 0, code)
        negative = tl.minimum(code, 127)
        negative = tl.where(negative > 0, negative + 128, 0)
        return tl.where(x < 0, negative, code).to(tl.uint8)
    return tl.where(size > 0, code, 0).to(tl.uint8)


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    return tl.load(pointers, mask=mask) if MASKED else tl.load(pointers)


@triton.jit
def _store(pointers, x, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, x, mask=mask)
    else:
        tl.store(pointers, x)


@triton.jit
def _load_moment(
    moments,
    scales,
    mask,
    scale_mask,
    MASTER: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Read moments: [BLOCK], or codes [blocks, SCALED] with one scale a block."""
    x = _load(moments, mask, MASKED)
    if SCALED:
        return _decode(x, SIGNED) * _load(scales, scale_mask, MASKED)[:, None]
    else:
        return x.to(MASTER)


@triton.jit
def _store_moment(
    moments,
    scales,
    x,
    mask,
    scale_mask,
    MOMENT: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Write what `_load_moment` read. Blocks are whole, so a mask hides none of their numbers."""
    if SCALED:
        scale = tl.max(tl.abs(x), axis=1)
        _store(scales, scale, scale_mask, MASKED)
        codes = _encode(x / tl.where(scale > 0, scale, 1.0)[:, None], SIGNED)
        _store(moments, codes, mask, MASKED)
    else:
        _store(moments, x.to(MOMENT), mask, MASKED)


@triton.jit
def _update(
    row,  # [7] int64: the addresses of one tensor
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
    SCALED: tl.constexpr,
):
    """Update a block. Without a mask, 16 bytes are accessed at a time."""
    if SCALED:
        block = tl.arange(0, BLOCK // SCALED)  # [blocks]
        offset = block[:, None] * SCALED + tl.arange(0, SCALED)[None, :]  # [blocks, SCALED]
        scale_mask = first + block * SCALED < size
        first_scales = _pointer(row, 5, tl.float32, False) + first // SCALED + block
        second_scales = _pointer(row, 6, tl.float32, False) + first // SCALED + block
    else:
        offset = tl.arange(0, BLOCK)  # [BLOCK]
        scale_mask = offset  # unused, like the scales
        first_scales = row
        second_scales = row
    mask = first + offset < size
    gradients = _pointer(row, 1, GRADIENT, ALIGNED) + first + offset
    masters = _pointer(row, 2, MASTER, ALIGNED) + first + offset
    m_pointers = _pointer(row, 3, MOMENT, ALIGNED) + first + offset
    v_pointers = _pointer(row, 4, MOMENT, ALIGNED) + first + offset

    # Moments
    gradient = _load(gradients, mask, MASKED).to(MASTER) * factor
    m = _load_moment(m_pointers, first_scales, mask, scale_mask, MASTER, MASKED, SCALED, True)
    v = _load_moment(v_pointers, second_scales, mask, scale_mask, MASTER, MASKED, SCALED, False)
    m += (1 - beta1) * (gradient - m)
    v = beta2 * v + (1 - beta2) * gradient * gradient
    _store_moment(m_pointers, first_scales, m, mask, scale_mask, MOMENT, MASKED, SCALED, True)
    _store_moment(v_pointers, second_scales, v, mask, scale_mask, MOMENT, MASKED, SCALED, False)

    # Weight
    master = _load(masters, mask, MASKED) * decay
    master -= step_size * m / (tl.sqrt(v) / correction + eps)
    _store(masters, master, mask, MASKED)
    if HAS_MASTER:
        weights = _pointer(row, 0, WEIGHT, ALIGNED) + first + offset
        _store(weights, master.to(WEIGHT), mask, MASKED)


@triton.jit
def adamw(
    addresses,  # [tensors, 7] int64: weight, gradient, master, both moments, their scales
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
    SCALED: tl.constexpr,
):
    """Update a block of a tensor. Without a master, its address is that of the weight.

    `SCALED` is how many moments in 8 bits have a scale; 0: moments have none.
    """
    block = tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    factor = tl.load(scale)
    row = addresses + tensor * 7
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
                    SCALED,
                )
