"""Moving rows between tokens and experts, and the sums of few numbers that go along. Every move is of whole tokens.

Copying from tokens, rather than collecting rows, reads each token once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import function_and_slope
from tokenyard_kernels_triton.kernels._schedule import tile_at
from tokenyard_kernels_triton.kernels._tiles import rounded


@triton.jit
def copy_to_rows(
    x,
    rows,
    inverse,
    live,
    dim,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy each token x [T, D] to its rows [R, D]; rows at and past `live` are left alone."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    kept = tl.load(live)
    value = tl.load(x + token * dim + column, mask=inside, other=0.0)
    for k in range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k)
        if row < kept:
            tl.store(rows + row.to(tl.int64) * dim + column, value, mask=inside)


@triton.jit(do_not_specialize=["bound"])
def clear_tail(
    rows,
    live,
    bound,
    dim,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write zeros to the rows [R, D] from `live` on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = ((row >= tl.load(live)) & (row < bound))[:, None] & (column < dim)[None, :]
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32).to(rows.dtype.element_ty)
    tl.store(rows + row.to(tl.int64)[:, None] * dim + column[None, :], zeros, mask=mask)


@triton.jit
def sum_to_tokens(
    rows,
    y,
    inverse,
    topk_weights,
    live,
    dim,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Write y [T, D]: the sum of each token's kept rows, weighted if WEIGHTED, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    kept = tl.load(live)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        row = tl.load(inverse + slot)
        width = tl.where(row < kept, dim, 0)
        value = tl.load(rows + row.to(tl.int64) * dim + column, mask=column < width, other=0.0).to(
            tl.float32
        )
        if WEIGHTED:  # a dropped slot's weight counts for nothing, whatever it is
            value = tl.where(
                column < width, value * tl.load(topk_weights + slot).to(tl.float32), 0.0
            )
        total += value
    tl.store(y + token * dim + column, rounded(total, y.dtype.element_ty), mask=inside)


@triton.jit
def weigh_to_rows(
    dy,
    rows,
    inverse,
    topk_weights,
    live,
    dim,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write each token dy [T, D], times the slot's weight, to its rows [R, D]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    kept = tl.load(live)
    value = tl.load(dy + token * dim + column, mask=inside, other=0.0).to(tl.float32)
    for k in range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k)
        if row < kept:
            w = tl.load(topk_weights + token * TOP_K + k).to(tl.float32)
            tl.store(
                rows + row.to(tl.int64) * dim + column,
                rounded(value * w, rows.dtype.element_ty),
                mask=inside,
            )


@triton.jit
def dot_with_rows(
    dy,
    rows,
    dweights,
    inverse,
    live,
    dim,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write dweights [T, K]: the dot product of dy [T, D] and each of the token's rows; 0 for a dropped slot."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(inverse + slot)
    width = tl.where(row < tl.load(live), dim, 0)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < width
        left = tl.load(dy + slot // TOP_K * dim + column, mask=mask, other=0.0).to(tl.float32)
        total += left * tl.load(rows + row.to(tl.int64) * dim + column, mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(dweights + slot, tl.sum(total))


@triton.jit
def differentiate(
    da,
    z,
    dz,
    weighted,
    dots,
    order,
    topk_weights,
    live,
    ffn_dim,
    dots_width,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From a row of da' [R, F], not weighted, write dz, the weighted activation w * a, and the row dot <da', a>."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(live):
        w = 1.0
        if WEIGHTED:
            w = tl.load(topk_weights + tl.load(order + row)).to(tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, ffn_dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = column < ffn_dim
            gradient = tl.load(da + row * ffn_dim + column, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(z + row * PARTS * ffn_dim + column, mask=mask, other=0.0).to(tl.float32)
            a, slope = function_and_slope(gate, FUNCTION)
            slope *= gradient * w
            at = dz + row * PARTS * ffn_dim + column
            if PARTS == 2:
                up = tl.load(z + (row * 2 + 1) * ffn_dim + column, mask=mask, other=0.0).to(
                    tl.float32
                )
                tl.store(at + ffn_dim, rounded(gradient * w * a, dz.dtype.element_ty), mask=mask)
                a, slope = a * up, slope * up
            tl.store(at, rounded(slope, dz.dtype.element_ty), mask=mask)
            tl.store(
                weighted + row * ffn_dim + column, rounded(a * w, dz.dtype.element_ty), mask=mask
            )
            total += gradient * a
        tl.store(dots + row * dots_width, tl.sum(total))


@triton.jit(do_not_specialize=["slots"])
def sum_dots(
    dots,
    dweights,
    inverse,
    live,
    slots,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write dweights [N]: the sum over each slot's row of dots [R, WIDTH]; 0 for a dropped slot."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(inverse + slot, mask=slot < slots, other=0)
    kept = (slot < slots) & (row < tl.load(live))
    pointers = dots + row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(
        dweights + slot,
        tl.sum(tl.load(pointers, mask=kept[:, None], other=0.0), 1),
        mask=slot < slots,
    )


@triton.jit
def bias_dots(
    dy,
    bias,
    dots,
    tiles,
    dim,
    dots_width,
    at,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write column `at` of dots [R, .]: the dot product of each row dy [R, D] and its expert's bias [E, D]."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles):
        expert, row, end, _ = tile_at(tiles, 1, tile, ROWS)
        r = row + tl.arange(0, ROWS)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            b = tl.load(bias + expert.to(tl.int64) * dim + column, mask=column < dim, other=0.0).to(
                tl.float32
            )
            mask = (r < end)[:, None] & (column < dim)[None, :]
            tile_dy = tl.load(
                dy + r.to(tl.int64)[:, None] * dim + column[None, :], mask=mask, other=0.0
            )
            total += tl.sum(tile_dy.to(tl.float32) * b[None, :], 1)
        tl.store(dots + r.to(tl.int64) * dots_width + at, total, mask=r < end)


@triton.jit
def sum_rows(
    rows,
    out,
    offsets,
    order,
    topk_weights,
    width,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write out [E, width]: the sum of each expert's rows [R, width], weighted if WEIGHTED; zero where it has none."""
    expert = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & (column < width)[None, :]
        value = tl.load(
            rows + r.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            slot = tl.load(order + r, mask=r < end, other=0)
            value *= tl.load(topk_weights + slot, mask=r < end, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(
        out + expert * width + column,
        rounded(tl.sum(total, 0), out.dtype.element_ty),
        mask=column < width,
    )
