"""The products of an expert layer for any GPU, over rows sorted by expert.

Every kernel is persistent: PROGRAMS of them walk over all output tiles. Legend: R rows, D model width, F expert width,
PARTS 2 for a gated activation (gate and up stand side by side) else 1.

Operands are read by pointers. Tensor descriptors would be faster on Hopper, but Triton 3.6 overwrites, in its software
pipeline, tiles whose descriptor has more than two dimensions while they are still being multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import function
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
    x,
    weight,
    bias,
    z,
    a,
    tiles,
    dim,
    ffn_dim,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    KEEP_A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F], COLUMNS of F at a time."""
    columns = tl.cdiv(ffn_dim, COLUMNS)
    for index in range(tl.program_id(0), tl.load(tiles) * columns, PROGRAMS):
        expert, row, end, n = tile_at(tiles, columns, index, ROWS)
        column = n * COLUMNS
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
            )
            total = dot(left, right.T, total, PRECISION)
        c = column + tl.arange(0, COLUMNS)
        if PARTS == 2:
            gate, up = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS]), [0, 2, 1]))
            if BIAS:
                first = bias + expert * 2 * ffn_dim + c
                gate += tl.load(first, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
                up += tl.load(first + ffn_dim, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
            gate, up = rounded(gate, TYPE), rounded(up, TYPE)
            if KEEP_Z:
                store_rows(
                    z,
                    gate,
                    row,
                    end,
                    0,
                    column,
                    ffn_dim,
                    2,
                    ROWS,
                    COLUMNS,
                )
                store_rows(
                    z,
                    up,
                    row,
                    end,
                    1,
                    column,
                    ffn_dim,
                    2,
                    ROWS,
                    COLUMNS,
                )
            act = function(gate.to(tl.float32), FUNCTION) * up.to(tl.float32)
        else:
            if BIAS:
                total += tl.load(bias + expert * ffn_dim + c, mask=c < ffn_dim, other=0.0).to(
                    tl.float32
                )[None, :]
            narrow = rounded(total, TYPE)
            if KEEP_Z:
                store_rows(
                    z,
                    narrow,
                    row,
                    end,
                    0,
                    column,
                    ffn_dim,
                    1,
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
                0,
                column,
                ffn_dim,
                1,
                ROWS,
                COLUMNS,
            )


@triton.jit
def times_weight(
    left,
    weight,
    bias,
    out,
    tiles,
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write out [R, width] = left [R, depth] @ weight [depth, width] + bias; TRANSPOSED: weight is [width, depth]."""
    columns = tl.cdiv(width, COLUMNS)
    for index in range(tl.program_id(0), tl.load(tiles) * columns, PROGRAMS):
        expert, row, end, n = tile_at(tiles, columns, index, ROWS)
        column = n * COLUMNS
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
                    1,
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
                    1,
                    DEPTH,
                    COLUMNS,
                )
            total = dot(rows, right, total, PRECISION)
        if BIAS:
            c = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + expert * width + c, mask=c < width, other=0.0).to(tl.float32)[
                None, :
            ]
        store_rows(
            out,
            rounded(total, TYPE),
            row,
            end,
            0,
            column,
            width,
            1,
            ROWS,
            COLUMNS,
        )


@triton.jit
def weight_gradient(
    left,
    right,
    out,
    offsets,
    by_rows,
    num_experts,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write out [E, rows, columns]: over each expert's rows, left [R, rows] transposed times right [R, columns].

    The experts with most rows come first. One that has none gets exact zeros.
    """
    m_tiles, n_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    each = m_tiles * n_tiles
    for index in range(tl.program_id(0), num_experts * each, PROGRAMS):
        expert = tl.load(by_rows + index // each)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % each, GROUP)
        start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
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
        store_weight(
            out,
            rounded(total, TYPE),
            expert,
            m * ROWS,
            n * COLUMNS,
            rows,
            columns,
            ROWS,
            COLUMNS,
        )
