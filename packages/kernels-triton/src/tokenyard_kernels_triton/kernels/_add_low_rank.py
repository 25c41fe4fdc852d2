"""Add the outputs of adapters, low-rank matmuls over rows sorted by expert, for any GPU.

They read and write their large operand once, and are limited by memory. Legend: R rows, E experts,
r rank of the adapter, padded to RANK in a tile and read SLICE at a time; width is D, F or 2F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import factor, function
from tokenyard_kernels_triton.kernels._low_rank import load_matrix
from tokenyard_kernels_triton.kernels._schedule import tile_at
from tokenyard_kernels_triton.kernels._tiles import (
    dot,
    load_rows,
    rounded,
    row_pointers,
    store_rows,
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
        right = load_matrix(
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
    mask,  # [R, width] bool, or None
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
            total = tl.where(tl.load(at, mask=inside, other=0), total, 0.0)
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
