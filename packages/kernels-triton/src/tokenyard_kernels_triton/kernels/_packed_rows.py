"""Rows in float8 with their scales behind them, which travel between ranks in one buffer."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._quantize import scale_of
from tokenyard_kernels_triton.kernels._tiles import rounded


@triton.jit
def pack_row(
    rows,  # [R, width]
    values,  # [R, width + 4 * blocks] float8 e4m3: the packed rows
    scales,  # the same memory in float32
    width,
    words,  # of 4 bytes in a packed row, so that the compiler knows how it is aligned
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize a part of a row; one program per part."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    value = tl.load(rows + row * width + column, mask=column < width, other=0.0)
    # The scales begin after `width` bytes of the row.
    target = scales + row * words + width // 4
    _store_quantized(
        value.to(tl.float32), values + row * words * 4, target, first, width, COLUMNS, BLOCK
    )


@triton.jit
def unpack_row(
    values,  # [R, width + 4 * blocks] float8 e4m3: the packed rows
    scales,  # the same memory in float32
    rows,  # [R, width]
    width,
    words,  # of 4 bytes in a packed row, so that the compiler knows how it is aligned
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the numbers of a part of a row; one program per part."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    inside = column < width
    value = tl.load(values + row * words * 4 + column, mask=inside, other=0.0).to(tl.float32)
    # The scales begin after `width` bytes of the row.
    source = scales + row * words + width // 4
    value = _times_scales(value, source, first, width, COLUMNS, BLOCK)
    tl.store(rows + row * width + column, rounded(value, rows.dtype.element_ty), mask=inside)


@triton.jit
def _store_quantized(
    value,  # [COLUMNS] float32 of one row, zero where columns do not exist
    values,  # pointer to the row's first number, float8 e4m3
    scales,  # pointer to the row's first scale
    first,  # column
    width,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a part of a row in float8, and its scales."""
    block = tl.arange(0, COLUMNS // BLOCK)
    column = first + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    blocks = tl.reshape(value, [COLUMNS // BLOCK, BLOCK])
    scale = scale_of(tl.max(tl.abs(blocks), 1))
    narrow = rounded(blocks / scale[:, None], tl.float8e4nv)
    tl.store(values + column, narrow, mask=column < width)
    tl.store(scales + first // BLOCK + block, scale, mask=first + block * BLOCK < width)


@triton.jit
def _times_scales(
    value,  # [COLUMNS] float32 of one row
    scales,  # pointer to the row's first scale
    first,  # column
    width,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a part of a row times its blocks' scales, each of which is loaded once."""
    block = tl.arange(0, COLUMNS // BLOCK)
    inside = first + block * BLOCK < width
    scale = tl.load(scales + first // BLOCK + block, mask=inside, other=0.0)
    blocks = tl.reshape(value, [COLUMNS // BLOCK, BLOCK]) * scale[:, None]
    return tl.reshape(blocks, [COLUMNS])
