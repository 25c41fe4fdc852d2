"""The matmuls of an expert layer for any GPU, over rows sorted by expert.

A program computes one output tile or a few, so a GPU balances their load, also beside kernels of
another stream. Where the number of rows is known on the device only, at most PROGRAMS walk over all
tiles: one for each tile of a bound could be far more than there are tiles. Legend: R rows, E
experts, D model width, F expert width, PARTS 2 for a gated activation (gate and up side by side),
else 1.

Kernels read their operands by pointers. Tensor descriptors would be faster on Hopper, but the
software pipeline of Triton 3.6 has a fault: if a descriptor has more than two dimensions, it
overwrites the descriptor's tiles while a matmul still reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import factor, function
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at, tile_at
from tokenyard_kernels_triton.kernels._tiles import (
    dot,
    load_rows,
    load_weight,
    rounded,
    store_rows,
    store_weight,
)


@triton.jit
def up_and_activate(
    x,  # [R, D]
    weight,  # [E, PARTS * F, D]
    bias,  # [E, PARTS * F] or None
    z,  # [R, PARTS * F]
    a,  # [R, F]
    tiles,  # tile list, see ``_schedule``
    dim,  # D
    ffn_dim,  # F
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    KEEP_A: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F], COLUMNS of F at a time."""
    columns = tl.cdiv(ffn_dim, COLUMNS)
    for index in range(tl.program_id(0), tl.load(tiles) * columns, PROGRAMS):
        expert, row, end, n = tile_at(tiles, columns, index, ROWS)
        column = n * COLUMNS

        # Main loop.
        total = tl.zeros([ROWS, PARTS * COLUMNS], tl.float32)
        for k in range(0, dim, DEPTH):
            left = load_rows(
                x,
                row,
                end,
                k,
                dim,
                ROWS,
                DEPTH,
            )
            right = load_weight(
                weight,
                expert,
                column,
                k,
                ffn_dim,
                dim,
                PARTS,
                COLUMNS,
                DEPTH,
            )  # [PARTS * COLUMNS, DEPTH]
            total = dot(left, right.T, total, PRECISION)

        # Epilogue: bias, rounding and activation. The activation sees the rounded z, so that
        # recomputing z gives the same bits.
        c = column + tl.arange(0, COLUMNS)
        if PARTS == 2:
            gate, up = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS]), [0, 2, 1]))
            if BIAS:
                first = bias + expert * 2 * ffn_dim + c
                gate += tl.load(first, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
                up += tl.load(first + ffn_dim, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
            gate = rounded(gate, TYPE)
            up = rounded(up, TYPE)
            if KEEP_Z:
                store_rows(
                    z,
                    gate,
                    row,
                    end,
                    0,  # part
                    column,
                    ffn_dim,
                    2,  # PARTS
                    ROWS,
                    COLUMNS,
                )
                store_rows(
                    z,
                    up,
                    row,
                    end,
                    1,  # part
                    column,
                    ffn_dim,
                    2,  # PARTS
                    ROWS,
                    COLUMNS,
                )
            act = function(gate.to(tl.float32), FUNCTION)
            act *= factor(up.to(tl.float32), FUNCTION)
        else:
            if BIAS:
                first = bias + expert * ffn_dim + c
                total += tl.load(first, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
            narrow = rounded(total, TYPE)
            if KEEP_Z:
                store_rows(
                    z,
                    narrow,
                    row,
                    end,
                    0,  # part
                    column,
                    ffn_dim,
                    1,  # PARTS
                    ROWS,
                    COLUMNS,
                )
            act = function(narrow.to(tl.float32), FUNCTION)
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
def times_weight(
    left,  # [R, depth]
    weight,  # [E, width, depth] if TRANSPOSED, else [E, depth, width]
    bias,  # [E, width] or None
    out,  # [R, width]
    tiles,  # tile list, see ``_schedule``
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write out = left @ weight + bias, with each row's expert's weight and bias."""
    columns = tl.cdiv(width, COLUMNS)
    for index in range(tl.program_id(0), tl.load(tiles) * columns, PROGRAMS):
        expert, row, end, n = tile_at(tiles, columns, index, ROWS)
        column = n * COLUMNS

        # Main loop.
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            rows = load_rows(
                left,
                row,
                end,
                k,
                depth,
                ROWS,
                DEPTH,
            )
            if TRANSPOSED:
                right = load_weight(
                    weight,
                    expert,
                    column,
                    k,
                    width,
                    depth,
                    1,  # PARTS
                    COLUMNS,
                    DEPTH,
                ).T
            else:
                right = load_weight(
                    weight,
                    expert,
                    k,
                    column,
                    depth,
                    width,
                    1,  # PARTS
                    DEPTH,
                    COLUMNS,
                )
            total = dot(rows, right, total, PRECISION)

        # Epilogue: bias and rounding.
        if BIAS:
            c = column + tl.arange(0, COLUMNS)
            value = tl.load(bias + expert * width + c, mask=c < width, other=0.0)
            total += value.to(tl.float32)[None, :]
        store_rows(
            out,
            rounded(total, TYPE),
            row,
            end,
            0,  # part
            column,
            width,
            1,  # PARTS
            ROWS,
            COLUMNS,
        )


@triton.jit
def weight_gradient(
    left,  # [R, rows]
    right,  # [R, columns]
    out,  # [E, rows, columns]
    offsets,  # [E + 1]
    by_rows,  # [E] experts, those with most rows first
    rows,
    columns,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write out[e] = left[rows of e].T @ right[rows of e] for each expert e, or add that to it.

    The experts with most rows come first. An expert without rows gets or adds exact zeros.
    """
    m_tiles = tl.cdiv(rows, ROWS)
    n_tiles = tl.cdiv(columns, COLUMNS)
    per_expert = m_tiles * n_tiles
    index = tl.program_id(0)
    expert = tl.load(by_rows + index // per_expert)
    m, n = matrix_tile_at(m_tiles, n_tiles, index % per_expert, GROUP)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)

    # Main loop over the expert's rows.
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(start, end, DEPTH):
        a = load_rows(
            left,
            k,
            end,
            m * ROWS,
            rows,
            DEPTH,
            ROWS,
        )
        b = load_rows(
            right,
            k,
            end,
            n * COLUMNS,
            columns,
            DEPTH,
            COLUMNS,
        )
        total = dot(a.T, b, total, PRECISION)

    # Epilogue.
    store_weight(
        out,
        total,
        expert,
        m * ROWS,
        n * COLUMNS,
        rows,
        columns,
        ADD,
        ROWS,
        COLUMNS,
        TYPE,
    )
