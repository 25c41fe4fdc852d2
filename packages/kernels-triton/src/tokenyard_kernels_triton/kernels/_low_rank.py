"""The low-rank matmuls of adapters over rows sorted by expert, for any GPU.

Each reads its large operand once, and is limited by memory. Legend: R rows, E experts, r rank of
the adapter, padded to RANK in a tile; width is D, F or 2F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import factor, function
from tokenyard_kernels_triton.kernels._schedule import tile_at
from tokenyard_kernels_triton.kernels._tiles import (
    dot,
    load_rows,
    load_weight,
    rounded,
    row_pointers,
    store_rows,
)


@triton.jit
def _load_wide(
    source,  # [R, width], or tokens [T, width] with TOP_K
    order,  # [R] slot of each row, read with TOP_K
    mask,  # [R, width] factors, or None
    row,
    end,
    column,
    width,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
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
        factors = tl.load(pointers, mask=inside, other=0.0)
        value = rounded(value.to(tl.float32) * factors.to(tl.float32), TYPE)
    return value


@triton.jit
def _load_matrix(
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
    mask,  # [R, width] factors, or None
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
                TYPE,
            )
            right = _load_matrix(
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
def _times_matrix(
    low,  # [R, r]
    matrix,  # [E, width, r] if TRANSPOSED, else [E, r, width]
    expert,
    row,
    end,
    column,
    rank,
    width,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return a tile [ROWS, COLUMNS] of low @ matrix in float32, SLICE of the rank at a time."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, RANK, SLICE):
        left = load_rows(
            low,
            row,
            end,
            k,
            rank,
            ROWS,
            SLICE,
        )
        right = _load_matrix(
            matrix,
            expert,
            k,
            column,
            rank,
            width,
            TRANSPOSED,
            SLICE,
            COLUMNS,
        )
        total = dot(left, right, total, PRECISION)
    return total


@triton.jit
def add_low_rank(
    low,  # [R, r]
    matrix,  # [E, width, r] if TRANSPOSED, else [E, r, width]
    mask,  # [R, width] factors, or None
    out,  # [R, width]
    tiles,  # tile list, see ``_schedule``
    rank,  # r
    width,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write out = (low @ matrix) * mask, plus the previous out with ADD."""
    columns = tl.cdiv(width, COLUMNS)
    index = tl.program_id(0)
    if index < tl.load(tiles) * columns:
        expert, row, end, n = tile_at(tiles, columns, index, ROWS)
        column = n * COLUMNS
        pointers, inside = row_pointers(
            out,
            row,
            end,
            0,  # part
            column,
            width,
            1,  # PARTS
            ROWS,
            COLUMNS,
        )

        # Load the previous values ahead of the matmul, whose operands come from cache.
        if ADD:
            before = tl.load(pointers, mask=inside, other=0.0)
        total = _times_matrix(
            low,
            matrix,
            expert,
            row,
            end,
            column,
            rank,
            width,
            TRANSPOSED,
            ROWS,
            COLUMNS,
            RANK,
            SLICE,
            PRECISION,
        )

        # Epilogue: mask, sum and rounding.
        if MASKED:
            at = row_pointers(
                mask,
                row,
                end,
                0,  # part
                column,
                width,
                1,  # PARTS
                ROWS,
                COLUMNS,
            )[0]
            total *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            total += before.to(tl.float32)
        tl.store(pointers, rounded(total, TYPE), mask=inside)


@triton.jit
def add_low_rank_and_activate(
    z,  # [R, PARTS * F]
    low,  # [R, r]
    matrix,  # [E, PARTS * F, r]
    a,  # [R, F], written if KEEP_A
    tiles,  # tile list, see ``_schedule``
    rank,  # r
    ffn_dim,  # F
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    KEEP_A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Add low @ matrix.T to z in place, and write a = act(z)."""
    columns = tl.cdiv(ffn_dim, COLUMNS)
    index = tl.program_id(0)
    if index < tl.load(tiles) * columns:
        expert, row, end, n = tile_at(tiles, columns, index, ROWS)
        column = n * COLUMNS

        # Load z ahead of the matmuls, whose operands come from cache.
        pointers, inside = row_pointers(
            z,
            row,
            end,
            0,  # part
            column,
            ffn_dim,
            PARTS,
            ROWS,
            COLUMNS,
        )
        gate = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if PARTS == 2:
            up = tl.load(pointers + ffn_dim, mask=inside, other=0.0).to(tl.float32)

        # The activation sees the rounded z, so that recomputing z gives the same bits.
        gate += _times_matrix(
            low,
            matrix,
            expert * PARTS,
            row,
            end,
            column,
            rank,
            ffn_dim,
            True,  # TRANSPOSED
            ROWS,
            COLUMNS,
            RANK,
            SLICE,
            PRECISION,
        )
        gate = rounded(gate, TYPE)
        tl.store(pointers, gate, mask=inside)
        act = function(gate.to(tl.float32), FUNCTION)
        if PARTS == 2:
            up += _times_matrix(
                low,
                matrix,
                expert * PARTS + 1,
                row,
                end,
                column,
                rank,
                ffn_dim,
                True,  # TRANSPOSED
                ROWS,
                COLUMNS,
                RANK,
                SLICE,
                PRECISION,
            )
            up = rounded(up, TYPE)
            tl.store(pointers + ffn_dim, up, mask=inside)
            act *= factor(up.to(tl.float32), FUNCTION)
        if KEEP_A:
            store_rows(
                a,
                rounded(act, TYPE),
                row,
                end,
                0,  # part
                column,
                ffn_dim,
                1,  # PARTS
                ROWS,
                COLUMNS,
            )


@triton.jit
def low_rank_gradient(
    source,  # [R, width], or tokens [T, width] with TOP_K
    order,  # [R] slot of each row, read with TOP_K or WEIGHTED
    mask,  # [R, width] factors, or None
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
            TYPE,
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
