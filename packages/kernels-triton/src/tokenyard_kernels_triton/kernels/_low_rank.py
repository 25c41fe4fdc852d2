"""Low-rank matmuls of adapters over rows sorted by expert, and their gradients, for any GPU.

Each reads its large operand once, and is limited by memory; ``_add_low_rank`` adds the results.
Legend: R rows, E experts, r rank of the adapter, padded to RANK in a tile; width is D, F or 2F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._schedule import tile_at
from tokenyard_kernels_triton.kernels._tiles import (
    dot,
    load_rows,
    load_weight,
    rounded,
    store_rows,
)


@triton.jit
def _load_wide(
    source,  # [R, width], or tokens [T, width] with TOP_K
    order,  # [R] slot of each row, read with TOP_K
    mask,  # [R, width] bool, or None
    row,
    end,
    column,
    width,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a tile [ROWS, COLUMNS] of rows, or of tokens with TOP_K; zero from `end` on."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    inside = (r < end)[:, None] & (c < width)[None, :]
    at = r
    if TOP_K > 0:
        at = tl.load(order + r, mask=r < end, other=0) // TOP_K
    pointers = source + (at.to(tl.int64) * width)[:, None] + c[None, :]
    value = tl.load(pointers, mask=inside, other=0.0)
    if MASKED:
        pointers = mask + (r.to(tl.int64) * width)[:, None] + c[None, :]
        value = tl.where(tl.load(pointers, mask=inside, other=0), value, 0.0)
    return value


@triton.jit
def load_matrix(
    matrix,  # [E, width, r] if TRANSPOSED, else [E, r, width]
    expert,
    first,  # of the rank
    column,
    rank,
    width,
    TRANSPOSED: tl.constexpr,
    SLICE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return [SLICE, COLUMNS] of an expert's matrix; zero outside of it."""
    if TRANSPOSED:
        tile = load_weight(
            matrix,
            expert,
            column,
            first,
            width,
            rank,
            1,  # PARTS
            COLUMNS,
            SLICE,
        ).T
    else:
        tile = load_weight(
            matrix,
            expert,
            first,
            column,
            rank,
            width,
            1,  # PARTS
            SLICE,
            COLUMNS,
        )
    return tile


@triton.jit
def to_low_rank(
    source,  # [R, width], or tokens [T, width] with TOP_K
    order,  # [R] slot of each row, read with TOP_K
    mask,  # [R, width] bool, or None
    matrix,  # [E, width, r] if TRANSPOSED, else [E, r, width]
    low,  # [R, r]
    tiles,  # tile list, see ``_schedule``
    width,
    rank,  # r
    scale,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write low = scale * (rows * mask) @ matrix.T, all columns in one tile."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles):
        expert, row, end, _ = tile_at(tiles, 1, tile, ROWS)

        # Main loop.
        total = tl.zeros([ROWS, RANK], tl.float32)
        for k in range(0, width, DEPTH):
            left = _load_wide(
                source,
                order,
                mask,
                row,
                end,
                k,
                width,
                TOP_K,
                MASKED,
                ROWS,
                DEPTH,
            )
            right = load_matrix(
                matrix,
                expert,
                0,  # first
                k,
                rank,
                width,
                TRANSPOSED,
                RANK,
                DEPTH,
            )  # [RANK, DEPTH]
            total = dot(left, right.T, total, PRECISION)

        # Epilogue: scale and rounding.
        store_rows(
            low,
            rounded(total * scale, TYPE),
            row,
            end,
            0,  # part
            0,  # column
            rank,
            1,  # PARTS
            ROWS,
            RANK,
        )


@triton.jit
def low_rank_gradient(
    source,  # [R, width], or tokens [T, width] with TOP_K
    order,  # [R] slot of each row, read with TOP_K or WEIGHTED
    mask,  # [R, width] bool, or None
    low,  # [R, r]
    topk_weights,  # [N], read if WEIGHTED
    out,  # [E, width, r] if TRANSPOSED, else [E, r, width]
    offsets,  # [E + 1]
    by_rows,  # [E] experts, those with most rows first
    width,
    rank,  # r
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write (rows * mask).T @ (low * weights) of each expert's rows; zero if it has none.

    A program computes COLUMNS of the width. The experts with most rows come first.
    """
    columns = tl.cdiv(width, COLUMNS)
    expert = tl.load(by_rows + tl.program_id(0) // columns).to(tl.int64)
    column = tl.program_id(0) % columns * COLUMNS
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)

    # Main loop over the expert's rows.
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for k in range(start, end, DEPTH):
        wide = _load_wide(
            source,
            order,
            mask,
            k,
            end,
            column,
            width,
            TOP_K,
            MASKED,
            DEPTH,
            COLUMNS,
        )
        narrow = load_rows(
            low,
            k,
            end,
            0,  # column
            rank,
            DEPTH,
            RANK,
        )
        if WEIGHTED:
            r = k + tl.arange(0, DEPTH)
            slot = tl.load(order + r, mask=r < end, other=0)
            weight = tl.load(topk_weights + slot, mask=r < end, other=0.0).to(tl.float32)
            narrow = rounded(narrow.to(tl.float32) * weight[:, None], TYPE)
        total = dot(wide.T, narrow, total, PRECISION)

    # Epilogue.
    c = column + tl.arange(0, COLUMNS)
    rank_index = tl.arange(0, RANK)
    inside = (c < width)[:, None] & (rank_index < rank)[None, :]
    first = out + expert * width * rank
    if TRANSPOSED:
        pointers = first + c[:, None] * rank + rank_index[None, :]
    else:
        pointers = first + c[:, None] + rank_index[None, :] * width
    tl.store(pointers, rounded(total, TYPE), mask=inside)
