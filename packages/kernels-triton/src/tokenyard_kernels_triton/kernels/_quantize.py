"""Conversions to fewer bits.

Rows become float8 e4m3, with a scale for every 128 columns of a row, and weights with a scale for
128 x 128 numbers (``tokenyard.fp8``). A float32 number becomes the sum of two numbers of 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard.fp8 import LARGEST, SMALLEST_SCALE
from tokenyard_kernels_triton.kernels._tiles import rounded

_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def scale_of(largest):
    """Return the scale that maps the largest magnitude of a block to the largest one of e4m3.

    `tl.max` ignores NaN, which stays NaN. An infinity makes NaN of its whole block.
    """
    return tl.maximum(largest / _LARGEST, _SMALLEST_SCALE)


@triton.jit(do_not_specialize=["rows"])
def quantize_rows(
    z,  # [R, width]
    values,  # [R, width] float8 e4m3
    scales,  # [R, blocks] float32
    live,  # [1], rows before the tail; None without a tail
    rows,  # R
    width,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write values and scales whose product is z."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    kept = row < rows
    if live is not None:
        kept = kept & (row < tl.load(live))
    mask = kept[:, None] & (column < width)[None, :]
    pointers = z + row[:, None] * width + column[None, :]
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    scale = scale_of(tl.max(tl.abs(value), 1))  # [ROWS]
    target = values + row[:, None] * width + column[None, :]
    tl.store(target, rounded(value / scale[:, None], tl.float8e4nv), mask=mask)
    tl.store(scales + row * blocks + block, scale, mask=kept)


@triton.jit
def quantize_weights(
    weights,  # [E, M, N]
    values,  # [E, M, N] float8 e4m3, or None
    transposed,  # [E, N, M] float8 e4m3, or None
    scales,  # [E, M / 128, N / 128]
    m_blocks,
    n_blocks,
    BLOCK: tl.constexpr,
):
    """Write values in one or both layouts, and a scale for each block; one program per block."""
    index = tl.program_id(0).to(tl.int64)
    expert = index // (m_blocks * n_blocks)
    m = index // n_blocks % m_blocks
    n = index % n_blocks
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]

    # The block's first number in each layout.
    at = ((expert * m_blocks + m) * BLOCK * n_blocks + n) * BLOCK
    at_transposed = ((expert * n_blocks + n) * BLOCK * m_blocks + m) * BLOCK
    block = tl.load(weights + at + row * n_blocks * BLOCK + column).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(block), 1), 0))
    tl.store(scales + index, scale)
    narrow = rounded(block / scale, tl.float8e4nv)
    if values is not None:
        tl.store(values + at + row * n_blocks * BLOCK + column, narrow)
    if transposed is not None:
        target = transposed + at_transposed + row * m_blocks * BLOCK + column
        tl.store(target, tl.trans(narrow))


@triton.jit
def dequantize_rows(
    values,  # [R, width] float8 e4m3
    scales,  # [R, blocks] float32
    z,  # [R, width]
    live,  # [1], rows before the tail
    width,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write z = values * scales."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    kept = row < tl.load(live)
    mask = kept[:, None] & (column < width)[None, :]
    pointers = values + row[:, None] * width + column[None, :]
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    scale = tl.load(scales + row * blocks + block, mask=kept, other=0.0)  # [ROWS]
    target = z + row[:, None] * width + column[None, :]
    tl.store(target, rounded(value * scale[:, None], z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def split_in_two(
    wide,  # [R, width] float32
    both,  # [R, 2 * width] in 16 bits
    rows,  # R
    width,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write each number rounded to 16 bits, and beside them the rounding errors in 16 bits."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(wide + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    high = rounded(value, both.dtype.element_ty)
    at = both + row[:, None] * 2 * width + column[None, :]
    tl.store(at, high, mask=mask)
    tl.store(at + width, rounded(value - high.to(tl.float32), both.dtype.element_ty), mask=mask)
