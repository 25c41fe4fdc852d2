"""The matmuls of an expert layer for few rows an expert, where reading the weights takes the time.

Operands are swapped: the weights are the left one, whose tiles have 64 rows or more, and the rows
of an expert are the columns of the output tile. So a tile wastes few multiplications, and there are
enough of them to read weights with all multiprocessors. The legend is that of ``_portable``.

There is no tile list. Each program looks its rows up in the plan's offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import (
    factor,
    function,
    function_and_slope,
    through_clamp,
)
from tokenyard_kernels_triton.kernels._chain import wait_for_launch_before
from tokenyard_kernels_triton.kernels._tiles import dot, put, rounded


@triton.jit
def rows_at(offsets, num_experts, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return (expert, first row, end of the expert's rows) of a tile of ROWS rows.

    The expert is EXPERTS if there is no such tile.
    """
    e = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + e, mask=e < num_experts, other=0)
    ends = tl.load(offsets + e + 1, mask=e < num_experts, other=0)
    counts = (ends - starts + ROWS - 1) // ROWS  # [EXPERTS] tiles
    before = tl.cumsum(counts, 0) <= tile  # experts whose last tile is before this one
    expert = tl.sum(before.to(tl.int32))
    first = tile - tl.sum(tl.where(before, counts, 0))
    is_own = e == expert
    start = tl.sum(tl.where(is_own, starts, 0)) + first * ROWS
    return expert, start, tl.sum(tl.where(is_own, ends, 0))


@triton.jit
def row_pointers(
    rows,  # [R, width], or tokens [T, width] if they are gathered
    order,  # [R] slot of each row, or None
    r,  # [ROWS]
    end,
    width,
    TOP_K: tl.constexpr,
):
    """Return a pointer to each row: of a matrix of rows, or of the tokens that `order` names."""
    if order is not None:
        r = tl.load(order + r, mask=r < end, other=0) // TOP_K
    return rows + r.to(tl.int64) * width


@triton.jit
def _add_slices(
    total,  # [M, ROWS]
    weight_rows,  # [M] pointers
    weight_mask,  # [M]
    rows,  # [ROWS] pointers
    rows_mask,  # [ROWS]
    depth,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return total + weight @ rows.T, whose operands are contiguous along `depth`."""
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        left = tl.load(
            weight_rows[:, None] + k[None, :],
            mask=weight_mask[:, None] & (k < depth)[None, :],
            other=0.0,
        )  # [M, DEPTH]
        right = tl.load(
            rows[:, None] + k[None, :], mask=rows_mask[:, None] & (k < depth)[None, :], other=0.0
        )  # [ROWS, DEPTH]
        total = dot(left, right.T, total, PRECISION)
    return total


@triton.jit
def up_and_activate_few(
    x,  # [T, D] with an order, else [R, D]
    order,  # [R] slot of each row, or None
    weight,  # [E, PARTS * F, D]
    bias,  # [E, PARTS * F] or None
    z,  # [R, PARTS * F]
    a,  # [R, F]
    offsets,  # [E + 1]
    num_experts,  # E
    dim,  # D
    ffn_dim,  # F
    TOP_K: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    KEEP_A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHAINED: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F], COLUMNS of F a program."""
    columns = tl.cdiv(ffn_dim, COLUMNS)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * COLUMNS
    if CHAINED:
        wait_for_launch_before()
    expert, row, end = rows_at(offsets, num_experts, tile, ROWS, EXPERTS)
    if expert < num_experts:
        # Main loop.
        r = row + tl.arange(0, ROWS)
        index = tl.arange(0, PARTS * COLUMNS)
        f = column + index % COLUMNS
        first = (expert.to(tl.int64) * PARTS + index // COLUMNS) * ffn_dim + f
        total = _add_slices(
            tl.zeros([PARTS * COLUMNS, ROWS], tl.float32),
            weight + first * dim,
            f < ffn_dim,
            row_pointers(x, order, r, end, dim, TOP_K),
            r < end,
            dim,
            DEPTH,
            PRECISION,
        )
        if BIAS:
            value = tl.load(bias + first, mask=f < ffn_dim, other=0.0)
            total += value.to(tl.float32)[:, None]

        # Epilogue: the activation sees the rounded z, as in ``_portable``.
        c = column + tl.arange(0, COLUMNS)
        mask = (c < ffn_dim)[:, None] & (r < end)[None, :]
        at_z = z + r.to(tl.int64)[None, :] * PARTS * ffn_dim + c[:, None]
        narrow = rounded(total, TYPE)
        if PARTS == 2:
            gate, up = tl.split(tl.permute(tl.reshape(narrow, [2, COLUMNS, ROWS]), [1, 2, 0]))
            if KEEP_Z:
                tl.store(at_z, gate, mask=mask)
                tl.store(at_z + ffn_dim, up, mask=mask)
            act = function(gate.to(tl.float32), FUNCTION)
            act *= factor(up.to(tl.float32), FUNCTION)
        else:
            if KEEP_Z:
                tl.store(at_z, narrow, mask=mask)
            act = function(narrow.to(tl.float32), FUNCTION)
        if KEEP_A:
            at_a = a + r.to(tl.int64)[None, :] * ffn_dim + c[:, None]
            tl.store(at_a, rounded(act, TYPE), mask=mask)


@triton.jit
def times_weight_few(
    left,  # [R, depth], or [T, depth] with an order
    order,  # [R] slot of each row, or None
    weight,  # [E, width, depth] if TRANSPOSED, else [E, depth, width]
    bias,  # [E, width] or None
    out,  # [R, width]
    offsets,  # [E + 1]
    num_experts,  # E
    depth,
    width,
    TOP_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHAINED: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write out = left @ weight + bias, with each row's expert's weight and bias."""
    columns = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * COLUMNS
    if CHAINED:
        wait_for_launch_before()
    expert, row, end = rows_at(offsets, num_experts, tile, ROWS, EXPERTS)
    if expert < num_experts:
        # Main loop.
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        rows = row_pointers(left, order, r, end, depth, TOP_K)
        matrix = weight + expert.to(tl.int64) * width * depth
        total = tl.zeros([COLUMNS, ROWS], tl.float32)
        if TRANSPOSED:
            weight_rows = matrix + c.to(tl.int64) * depth
            total = _add_slices(
                total, weight_rows, c < width, rows, r < end, depth, DEPTH, PRECISION
            )
        else:
            total = _add_columns(total, matrix, c, rows, r < end, depth, width, DEPTH, PRECISION)

        # Epilogue: bias and rounding.
        if BIAS:
            value = tl.load(bias + expert * width + c, mask=c < width, other=0.0)
            total += value.to(tl.float32)[:, None]
        target = out + r.to(tl.int64)[None, :] * width + c[:, None]
        mask = (c < width)[:, None] & (r < end)[None, :]
        tl.store(target, rounded(total, TYPE), mask=mask)


@triton.jit
def _add_columns(
    total,  # [COLUMNS, ROWS]
    matrix,  # pointer to [depth, width]
    columns,  # [COLUMNS]
    rows,  # [ROWS] pointers
    rows_mask,  # [ROWS]
    depth,
    width,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return total + matrix[:, columns].T @ rows.T."""
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        left = tl.load(
            matrix + k[:, None] * width + columns[None, :],
            mask=(k < depth)[:, None] & (columns < width)[None, :],
            other=0.0,
        )  # [DEPTH, COLUMNS]
        right = tl.load(
            rows[:, None] + k[None, :], mask=rows_mask[:, None] & (k < depth)[None, :], other=0.0
        )  # [ROWS, DEPTH]
        total = dot(left.T, right.T, total, PRECISION)
    return total


@triton.jit
def differentiate_down_few(
    dy,  # [T, D] with TOP_K, else rows [R, D]
    weight,  # [E, D, F]
    z,  # [R, PARTS * F]
    dz,  # [R, PARTS * F]
    weighted,  # [R, F]
    dots,  # [R, columns]
    order,  # [R] slot of each row
    topk_weights,  # [N], read if WEIGHTED
    offsets,  # [E + 1]
    num_experts,  # E
    dim,  # D
    ffn_dim,  # F
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHAINED: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write dz, the weighted activation w * a, and the dots <da, a>, for da = dy @ down.

    A program has COLUMNS of F. Its sums are one column of dots.
    """
    columns = tl.cdiv(ffn_dim, COLUMNS)
    tile = tl.program_id(0) // columns
    n = tl.program_id(0) % columns
    if CHAINED:
        wait_for_launch_before()
    expert, row, end = rows_at(offsets, num_experts, tile, ROWS, EXPERTS)
    if expert < num_experts:
        # Main loop: da, not weighted.
        r = row + tl.arange(0, ROWS)
        c = n * COLUMNS + tl.arange(0, COLUMNS)
        rows = row_pointers(dy, order if TOP_K else None, r, end, dim, TOP_K)
        matrix = weight + expert.to(tl.int64) * dim * ffn_dim
        gradient = _add_columns(
            tl.zeros([COLUMNS, ROWS], tl.float32),
            matrix,
            c,
            rows,
            r < end,
            dim,
            ffn_dim,
            DEPTH,
            PRECISION,
        )

        # Epilogue, as in ``_moves.differentiate``.
        w = tl.full([ROWS], 1.0, tl.float32)
        if WEIGHTED:
            slot = tl.load(order + r, mask=r < end, other=0)
            w = tl.load(topk_weights + slot, mask=r < end, other=0.0).to(tl.float32)
        mask = (c < ffn_dim)[:, None] & (r < end)[None, :]
        first = r.to(tl.int64)[None, :] * PARTS * ffn_dim + c[:, None]
        a, slope = function_and_slope(
            tl.load(z + first, mask=mask, other=0.0).to(tl.float32), FUNCTION
        )
        slope *= gradient * w[None, :]
        if PARTS == 2:
            up = tl.load(z + first + ffn_dim, mask=mask, other=0.0).to(tl.float32)
            dup = through_clamp(gradient * w[None, :] * a, up, FUNCTION)
            tl.store(dz + first + ffn_dim, rounded(dup, TYPE), mask=mask)
            a *= factor(up, FUNCTION)
            slope *= factor(up, FUNCTION)
        tl.store(dz + first, rounded(slope, TYPE), mask=mask)
        at = weighted + r.to(tl.int64)[None, :] * ffn_dim + c[:, None]
        tl.store(at, rounded(a * w[None, :], TYPE), mask=mask)
        total = tl.sum(tl.where(mask, gradient * a, 0.0), 0)
        tl.store(dots + r.to(tl.int64) * columns + n, total, mask=r < end)


@triton.jit
def weight_gradient_few(
    left,  # [R, rows], or [T, rows] if it is gathered
    right,  # [R, columns], or [T, columns] if it is gathered
    left_order,  # [R] slot of each row, or None
    right_order,  # [R] slot of each row, or None
    out,  # [E, rows, columns]
    offsets,  # [E + 1]
    rows,
    columns,
    ADD: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write out[e] = left[rows of e].T @ right[rows of e], ROWS of its rows a program, or add it.

    An expert without rows gets or adds exact zeros.
    """
    m_tiles = tl.cdiv(rows, ROWS)
    expert = (tl.program_id(0) // m_tiles).to(tl.int64)
    m = tl.program_id(0) % m_tiles * ROWS + tl.arange(0, ROWS)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    target = out + (expert * rows + m)[:, None] * columns
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    a = _slice(left, left_order, start, end, m, rows, TOP_K, DEPTH)
    if end - start <= DEPTH:  # a loop of its own, whose loads are ahead of its stores
        for column in tl.range(0, columns, COLUMNS, num_stages=STAGES):
            n = column + tl.arange(0, COLUMNS)
            b = _slice(right, right_order, start, end, n, columns, TOP_K, DEPTH)
            mask = (m < rows)[:, None] & (n < columns)[None, :]
            put(target + n[None, :], dot(a.T, b, zeros, PRECISION), mask, ADD, TYPE)
    else:
        for column in range(0, columns, COLUMNS):
            n = column + tl.arange(0, COLUMNS)
            total = zeros
            for first in range(start, end, DEPTH):
                a = _slice(left, left_order, first, end, m, rows, TOP_K, DEPTH)
                b = _slice(right, right_order, first, end, n, columns, TOP_K, DEPTH)
                total = dot(a.T, b, total, PRECISION)
            mask = (m < rows)[:, None] & (n < columns)[None, :]
            put(target + n[None, :], total, mask, ADD, TYPE)


@triton.jit
def _slice(matrix, order, first, end, columns, width, TOP_K: tl.constexpr, DEPTH: tl.constexpr):
    """Return columns of the DEPTH rows from `first` on; zero from row `end` on."""
    r = first + tl.arange(0, DEPTH)
    pointers = row_pointers(matrix, order, r, end, width, TOP_K)[:, None] + columns[None, :]
    return tl.load(pointers, mask=(r < end)[:, None] & (columns < width)[None, :], other=0.0)
