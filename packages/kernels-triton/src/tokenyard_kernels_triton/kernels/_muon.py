"""The elementwise parts of Muon: before its matrices are orthogonalised, and after."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nesterov(
    gradient,  # [size]
    momentum,  # [size]
    update,  # [size], written
    scale,  # []: a factor of the gradient; the momentum does not change if it is not finite
    size,
    beta,
    BLOCK: tl.constexpr,
):
    """Move the momentum towards the gradient by 1 - beta; write Nesterov's update."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    factor = tl.load(scale).to(tl.float32)
    m = tl.load(momentum + index, mask=mask).to(tl.float32)
    if tl.abs(factor) < float("inf"):
        g = tl.load(gradient + index, mask=mask).to(tl.float32) * factor
        m += (1 - beta) * (g - m)
        tl.store(momentum + index, m.to(momentum.dtype.element_ty), mask=mask)
        m = g + beta * (m - g)
    tl.store(update + index, m.to(update.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def scale_matrices(
    source,  # [B, size]
    out,  # [B, size], in another dtype
    factors,  # [B] or None
    factor,
    size,
    blocks,  # of a matrix
    source_stride,  # between matrices
    out_stride,
    BLOCK: tl.constexpr,
):
    """Write out = source * factor * factors."""
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    if factors is not None:
        factor *= tl.load(factors + matrix)
    x = tl.load(source + matrix * source_stride + index, mask=mask).to(tl.float32) * factor
    tl.store(out + matrix * out_stride + index, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def descend(
    direction,  # [size]
    master,  # [size]
    weight,  # [size], the rounded master; unused if that is the weight
    rate,  # []: the learning rate, 0 if nothing may change
    decay,  # [] 1 - rate * weight decay
    size,
    HAS_MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Shrink a master, subtract rate * direction, and write the weight."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    d = tl.load(direction + index, mask=mask).to(tl.float32)
    x = tl.load(master + index, mask=mask) * tl.load(decay) - tl.load(rate) * d
    tl.store(master + index, x, mask=mask)
    if HAS_MASTER:
        tl.store(weight + index, x.to(weight.dtype.element_ty), mask=mask)
