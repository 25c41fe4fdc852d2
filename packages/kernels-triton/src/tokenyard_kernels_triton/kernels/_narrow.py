"""Keeping a pre-activation in 8-bit floating point, with a scale for every 128 columns of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._tiles import rounded

BLOCK = 128
"""Columns that share a scale."""


@triton.jit
def narrow_rows(z, narrow, scales, live, width, blocks, LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write narrow [R, width] in float8 e4m3 and scales [R, blocks], so that z is their product."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    kept = row < tl.load(live)
    mask = kept[:, None] & (column < width)[None, :]
    value = tl.load(z + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    highest = tl.max(tl.abs(value), 1)
    scale = tl.where(highest > 0.0, highest / LARGEST, 1.0)
    tl.store(narrow + row[:, None] * width + column[None, :], rounded(value / scale[:, None], tl.float8e4nv), mask=mask)
    tl.store(scales + row * blocks + block, scale, mask=kept)


@triton.jit
def widen_rows(narrow, scales, z, live, width, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write z [R, width] = narrow times scales."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    kept = row < tl.load(live)
    mask = kept[:, None] & (column < width)[None, :]
    value = tl.load(narrow + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scales + row * blocks + block, mask=kept, other=0.0)
    tl.store(z + row[:, None] * width + column[None, :], rounded(value * scale[:, None], z.dtype.element_ty), mask=mask)
