"""The gradient through the activation, for matmuls in FP8: it reads and writes blocks of float8.

Legend: R rows, F expert width. PARTS is 2 for a gated activation (gate and up) and 1 otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard.fp8 import BLOCK
from tokenyard_kernels_triton.kernels._activations import (
    factor,
    function_and_slope,
    through_clamp,
)
from tokenyard_kernels_triton.kernels._quantize import scale_of
from tokenyard_kernels_triton.kernels._tiles import rounded

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _load(numbers, scales, mask, inside):
    """Return [., 128] numbers in float32, times their blocks' scales unless `scales` is None."""
    block = tl.load(numbers, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        block *= tl.load(scales, mask=inside, other=0.0)[:, None]
    return block


@triton.jit
def _store(block, numbers, values, scales, mask, inside):
    """Write [., 128] numbers in 16 bits, and in float8 with a scale for each block."""
    tl.store(numbers, rounded(block, numbers.dtype.element_ty), mask=mask)
    scale = scale_of(tl.max(tl.abs(block), 1))
    tl.store(values, rounded(block * (1.0 / scale)[:, None], tl.float8e4nv), mask=mask)
    tl.store(scales, scale, mask=inside)


@triton.jit
def differentiate_fp8(
    da,  # [R, F], not weighted
    z,  # [R, PARTS * F], in float8 if it has scales
    z_scales,  # [R, PARTS * F / 128] or None
    dz,  # [R, PARTS * F] in 16 bits
    dz_values,  # [R, PARTS * F] float8
    dz_scales,  # [R, PARTS * F / 128]
    weighted,  # [R, F]
    dots,  # [R, dots_width]
    order,  # [R] slot of each row
    topk_weights,  # [N], read if WEIGHTED
    live,  # [1], rows before the tail
    ffn_dim,  # F
    dots_width,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write one row of what ``_moves.differentiate`` writes, and of dz in float8.

    It computes BLOCKS blocks of 128 columns at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(live):
        w = 1.0
        if WEIGHTED:
            w = tl.load(topk_weights + tl.load(order + row)).to(tl.float32)
        blocks = ffn_dim // _BLOCK
        column = tl.arange(0, _BLOCK)
        total = tl.zeros([BLOCKS, _BLOCK], tl.float32)
        for first in range(0, blocks, BLOCKS):
            # Offsets of the blocks in [R, F] and in [R, PARTS * F], and of the latter's scales.
            block = first + tl.arange(0, BLOCKS)
            inside = block < blocks
            mask = inside[:, None] & (column < _BLOCK)[None, :]
            of_a = row * ffn_dim + (block * _BLOCK)[:, None] + column[None, :]
            of_z = row * PARTS * ffn_dim + (block * _BLOCK)[:, None] + column[None, :]
            of_scale = row * PARTS * blocks + block
            gradient = tl.load(da + of_a, mask=mask, other=0.0).to(tl.float32)
            scale_at = None
            if z_scales is not None:
                scale_at = z_scales + of_scale
            gate = _load(z + of_z, scale_at, mask, inside)

            # f(gate) and f'(gate) times the weighted gradient; with a gate, times `up` as well.
            a, slope = function_and_slope(gate, FUNCTION)
            slope *= gradient * w
            if PARTS == 2:
                if z_scales is not None:
                    scale_at += blocks
                up = _load(z + of_z + ffn_dim, scale_at, mask, inside)
                dup = through_clamp(gradient * w * a, up, FUNCTION)
                at = of_z + ffn_dim
                _store(dup, dz + at, dz_values + at, dz_scales + of_scale + blocks, mask, inside)
                a *= factor(up, FUNCTION)
                slope *= factor(up, FUNCTION)
            _store(slope, dz + of_z, dz_values + of_z, dz_scales + of_scale, mask, inside)
            tl.store(weighted + of_a, rounded(a * w, weighted.dtype.element_ty), mask=mask)
            total += gradient * a
        tl.store(dots + row * dots_width, tl.sum(total))
