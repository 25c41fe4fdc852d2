"""Rows transposed and quantized to e4m3, as the weight gradients in FP8 read them.

The result [W, blocks * 128] has a column for each row. Rows of different experts never share a
block of 128 (``_schedule.first_block``), and zeros fill an expert's last block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard.fp8 import BLOCK
from tokenyard_kernels_triton.kernels._quantize import scale_of
from tokenyard_kernels_triton.kernels._schedule import first_block, tile_at
from tokenyard_kernels_triton.kernels._tiles import rounded

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def transpose_rows(
    rows,  # [R, width] rows, or with TOP_K tokens [T, width]
    order,  # [R] slot of each row, or None without TOP_K
    values,  # [width, blocks * 128] float8 e4m3
    scales,  # [width, blocks], or [width / 128, blocks] if SQUARE
    offsets,  # [E + 1]
    tiles,  # list of tiles of 128 rows, see ``_schedule``
    width,
    blocks,
    TOP_K: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """Write 128 rows of one expert and 128 columns, with a scale for each column or for all."""
    index = tl.program_id(0)
    if index < tl.load(tiles):
        expert, row, end, _ = tile_at(tiles, 1, index, _BLOCK)
        start = tl.load(offsets + expert)
        block = first_block(start, expert) + (row - start) // _BLOCK
        r = row + tl.arange(0, _BLOCK)
        column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
        source = r
        if TOP_K:
            source = tl.load(order + r, mask=r < end, other=0) // TOP_K
        at = source.to(tl.int64)[:, None] * width + column[None, :]
        number = tl.load(rows + at, mask=(r < end)[:, None], other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(number), 0)  # [128 columns]
        if SQUARE:
            scale = scale_of(tl.max(largest, 0))
            number *= 1.0 / scale
            tl.store(scales + tl.program_id(1).to(tl.int64) * blocks + block, scale)
        else:
            scale = scale_of(largest)
            number *= (1.0 / scale)[None, :]
            tl.store(scales + column.to(tl.int64) * blocks + block, scale)
        target = column.to(tl.int64)[:, None] * (blocks * _BLOCK)
        target += block * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        tl.store(values + target, tl.trans(rounded(number, tl.float8e4nv)))
