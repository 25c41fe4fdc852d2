"""The products of an expert layer, over rows sorted by expert.

Every kernel is persistent: PROGRAMS of them walk over all output tiles. Legend: R rows, D model width, F expert width,
PARTS 2 for a gated activation (gate and up stand side by side) else 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import function, slope
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at, tile_at
from tokenyard_kernels_triton.kernels._tiles import (
    dot,
    halves,
    load_rows,
    load_weight,
    rounded,
    store_rows,
    store_weight,
)


@triton.jit
def up_and_activate(
    x, weight, bias, z, a, tiles, dim, ffn_dim,
    FUNCTION: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, KEEP_Z: tl.constexpr, KEEP_A: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F], COLUMNS of F at a time."""
    count = tl.load(tiles)
    columns = tl.cdiv(ffn_dim, COLUMNS)
    for index in tl.range(tl.program_id(0), count * columns, PROGRAMS, flatten=FLATTEN):
        expert, row, end, n = tile_at(tiles, count, columns, index, GROUP)
        column = n * COLUMNS
        total = tl.zeros([ROWS, PARTS * COLUMNS], tl.float32)
        for k in range(0, dim, DEPTH):
            left = load_rows(x, row, end, 0, k, dim, 1, ROWS, DEPTH, TMA)
            right = load_weight(weight, expert, column, k, ffn_dim, dim, PARTS, COLUMNS, DEPTH, TMA)
            total = dot(left, right.T, total, PRECISION)
        c = column + tl.arange(0, COLUMNS)
        if PARTS == 2:
            gate, up = halves(total, ROWS, 2 * COLUMNS)
            if BIAS:
                first = bias + expert * 2 * ffn_dim + c
                gate += tl.load(first, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
                up += tl.load(first + ffn_dim, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
            gate, up = rounded(gate, TYPE), rounded(up, TYPE)
            if KEEP_Z:
                store_rows(z, gate, row, end, 0, column, ffn_dim, 2, ROWS, COLUMNS, TMA)
                store_rows(z, up, row, end, 1, column, ffn_dim, 2, ROWS, COLUMNS, TMA)
            if KEEP_A:
                act = rounded(function(gate.to(tl.float32), FUNCTION) * up.to(tl.float32), TYPE)
                store_rows(a, act, row, end, 0, column, ffn_dim, 1, ROWS, COLUMNS, TMA)
        else:
            if BIAS:
                total += tl.load(bias + expert * ffn_dim + c, mask=c < ffn_dim, other=0.0).to(tl.float32)[None, :]
            narrow = rounded(total, TYPE)
            if KEEP_Z:
                store_rows(z, narrow, row, end, 0, column, ffn_dim, 1, ROWS, COLUMNS, TMA)
            if KEEP_A:
                act = rounded(function(narrow.to(tl.float32), FUNCTION), TYPE)
                store_rows(a, act, row, end, 0, column, ffn_dim, 1, ROWS, COLUMNS, TMA)


@triton.jit
def times_weight(
    left, weight, bias, out, tiles, depth, width,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Write out [R, width] = left [R, depth] @ weight [depth, width] + bias; TRANSPOSED: weight is [width, depth]."""
    count = tl.load(tiles)
    columns = tl.cdiv(width, COLUMNS)
    for index in tl.range(tl.program_id(0), count * columns, PROGRAMS, flatten=FLATTEN):
        expert, row, end, n = tile_at(tiles, count, columns, index, GROUP)
        column = n * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            rows = load_rows(left, row, end, 0, k, depth, 1, ROWS, DEPTH, TMA)
            if TRANSPOSED:
                right = load_weight(weight, expert, column, k, width, depth, 1, COLUMNS, DEPTH, TMA).T
            else:
                right = load_weight(weight, expert, k, column, depth, width, 1, DEPTH, COLUMNS, TMA)
            total = dot(rows, right, total, PRECISION)
        if BIAS:
            c = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + expert * width + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
        store_rows(out, rounded(total, TYPE), row, end, 0, column, width, 1, ROWS, COLUMNS, TMA)


@triton.jit
def activation_gradient(
    dy, weight, z, dz, weighted, dots, order, topk_weights, tiles, dim, ffn_dim, dots_width,
    FUNCTION: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """From da' = dy @ down, write dz, the weighted activation w * a, and the row dots <da', a> of each tile.

    dy [R, D] is not weighted; da = w da'. The epilogue takes PIECES of the columns one after another, for registers.
    """
    count = tl.load(tiles)
    columns = tl.cdiv(ffn_dim, COLUMNS)
    for index in tl.range(tl.program_id(0), count * columns, PROGRAMS, flatten=FLATTEN):
        expert, row, end, n = tile_at(tiles, count, columns, index, GROUP)
        column = n * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, dim, DEPTH):
            left = load_rows(dy, row, end, 0, k, dim, 1, ROWS, DEPTH, TMA)
            right = load_weight(weight, expert, k, column, dim, ffn_dim, 1, DEPTH, COLUMNS, TMA)
            total = dot(left, right, total, PRECISION)
        r = row + tl.arange(0, ROWS)
        if WEIGHTED:
            slot = tl.load(order + r, mask=r < end, other=0)
            w = tl.load(topk_weights + slot, mask=r < end, other=0.0)[:, None]
        else:
            w = tl.full([ROWS, 1], 1.0, tl.float32)
        sums = _finish_pieces(total, w, z, dz, weighted, row, end, column, ffn_dim, PIECES, FUNCTION, PARTS, ROWS, COLUMNS, TMA, TYPE)  # fmt: skip
        tl.store(dots + r.to(tl.int64) * dots_width + n, sums, mask=r < end)


@triton.jit
def _finish_pieces(da, w, z, dz, weighted, row, end, column, ffn_dim, PIECES: tl.constexpr, FUNCTION: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    if PIECES == 1:
        return _finish(da, w, z, dz, weighted, row, end, column, ffn_dim, FUNCTION, PARTS, ROWS, COLUMNS, TMA, TYPE)
    else:
        HALF: tl.constexpr = COLUMNS // 2
        one, two = halves(da, ROWS, COLUMNS)
        sums = _finish_pieces(one, w, z, dz, weighted, row, end, column, ffn_dim, PIECES // 2, FUNCTION, PARTS, ROWS, HALF, TMA, TYPE)  # fmt: skip
        return sums + _finish_pieces(two, w, z, dz, weighted, row, end, column + HALF, ffn_dim, PIECES // 2, FUNCTION, PARTS, ROWS, HALF, TMA, TYPE)  # fmt: skip


@triton.jit
def _finish(da, w, z, dz, weighted, row, end, column, ffn_dim, FUNCTION: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Finish COLUMNS of the gradient da' [ROWS, COLUMNS]; return the row sums of da' * a."""
    gate = load_rows(z, row, end, 0, column, ffn_dim, PARTS, ROWS, COLUMNS, TMA).to(tl.float32)
    opened = function(gate, FUNCTION)
    scaled = da * w
    if PARTS == 2:
        up = load_rows(z, row, end, 1, column, ffn_dim, PARTS, ROWS, COLUMNS, TMA).to(tl.float32)
        a = opened * up
        store_rows(dz, rounded(scaled * opened, TYPE), row, end, 1, column, ffn_dim, PARTS, ROWS, COLUMNS, TMA)
        dgate = scaled * up * slope(gate, FUNCTION)
    else:
        a = opened
        dgate = scaled * slope(gate, FUNCTION)
    store_rows(dz, rounded(dgate, TYPE), row, end, 0, column, ffn_dim, PARTS, ROWS, COLUMNS, TMA)
    store_rows(weighted, rounded(a * w, TYPE), row, end, 0, column, ffn_dim, 1, ROWS, COLUMNS, TMA)
    return tl.sum(da * a, 1)


@triton.jit
def weight_gradient(
    left, right, out, offsets, by_rows, num_experts, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Write out [E, rows, columns]: over each expert's rows, left [R, rows] transposed times right [R, columns].

    The experts with most rows come first. One that has none gets exact zeros.
    """
    m_tiles, n_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    each = m_tiles * n_tiles
    for index in tl.range(tl.program_id(0), num_experts * each, PROGRAMS, flatten=FLATTEN):
        expert = tl.load(by_rows + index // each)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % each, GROUP)
        start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(start, end, DEPTH):
            a = load_rows(left, k, end, 0, m * ROWS, rows, 1, DEPTH, ROWS, TMA)
            b = load_rows(right, k, end, 0, n * COLUMNS, columns, 1, DEPTH, COLUMNS, TMA)
            total = dot(a.T, b, total, PRECISION)
        store_weight(out, rounded(total, TYPE), expert, m * ROWS, n * COLUMNS, rows, columns, ROWS, COLUMNS, TMA)
