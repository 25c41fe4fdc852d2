"""Conversions to fewer bits.

A pre-activation becomes float8 e4m3, with a scale for every 128 columns of a row. A float32 number
becomes the sum of two numbers of 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._tiles import rounded

BLOCK = 128
"""Columns that share a scale."""


@triton.jit
def quantize_rows(
    z,  # [R, width]
    values,  # [R, width] float8 e4m3
    scales,  # [R, blocks] float32
    live,  # [1], rows before the tail
    width,
    blocks,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write values and scales whose product is z; a block's largest number becomes LARGEST."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    kept = row < tl.load(live)
    mask = kept[:, None] & (column < width)[None, :]
    pointers = z + row[:, None] * width + column[None, :]
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    highest = tl.max(tl.abs(value), 1)  # [ROWS]
    scale = tl.where(highest > 0.0, highest / LARGEST, 1.0)
    target = values + row[:, None] * width + column[None, :]
    tl.store(target, rounded(value / scale[:, None], tl.float8e4nv), mask=mask)
    tl.store(scales + row * blocks + block, scale, mask=kept)


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
