"""Numbers in fewer bits: a pre-activation in 8, with a scale for every 128 columns of a row; a float32 as two narrow ones."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._tiles import rounded

BLOCK = 128
"""Columns that share a scale."""


@triton.jit
def narrow_rows(
    z,
    narrow,
    scales,
    live,
    width,
    blocks,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write narrow [R, width] in float8 e4m3 and scales [R, blocks], so that z is their product."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    kept = row < tl.load(live)
    mask = kept[:, None] & (column < width)[None, :]
    value = tl.load(z + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    highest = tl.max(tl.abs(value), 1)
    scale = tl.where(highest > 0.0, highest / LARGEST, 1.0)
    tl.store(
        narrow + row[:, None] * width + column[None, :],
        rounded(value / scale[:, None], tl.float8e4nv),
        mask=mask,
    )
    tl.store(scales + row * blocks + block, scale, mask=kept)


@triton.jit
def widen_rows(
    narrow,
    scales,
    z,
    live,
    width,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write z [R, width] = narrow times scales."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    kept = row < tl.load(live)
    mask = kept[:, None] & (column < width)[None, :]
    value = tl.load(narrow + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    scale = tl.load(scales + row * blocks + block, mask=kept, other=0.0)
    tl.store(
        z + row[:, None] * width + column[None, :],
        rounded(value * scale[:, None], z.dtype.element_ty),
        mask=mask,
    )


@triton.jit(do_not_specialize=["rows"])
def split_in_two(
    wide,
    both,
    rows,
    width,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write both [R, 2 * width]: wide [R, width] in a narrower type, and what that has left out."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(wide + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    high = rounded(value, both.dtype.element_ty)
    at = both + row[:, None] * 2 * width + column[None, :]
    tl.store(at, high, mask=mask)
    tl.store(at + width, rounded(value - high.to(tl.float32), both.dtype.element_ty), mask=mask)
