"""Copies between tokens and rows, and elementwise kernels and sums over rows.

The copies walk over tokens, not over rows, so that each token is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._activations import (
    factor,
    function_and_slope,
    through_clamp,
)
from tokenyard_kernels_triton.kernels._chain import wait_for_launch_before
from tokenyard_kernels_triton.kernels._schedule import tile_at
from tokenyard_kernels_triton.kernels._tiles import rounded


@triton.jit
def copy_to_rows(
    x,  # [T, D]
    rows,  # [R, D]
    inverse,  # [N] row of each slot
    live,  # [1], rows before the tail
    dim,  # D
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy each token to its rows; the tail is not written."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    kept = tl.load(live)
    value = tl.load(x + token * dim + column, mask=inside, other=0.0)  # [COLUMNS]
    for k in range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k)
        if row < kept:
            tl.store(rows + row.to(tl.int64) * dim + column, value, mask=inside)


@triton.jit(do_not_specialize=["bound"])
def clear_tail(
    rows,  # [R, D]
    live,  # [1], rows before the tail
    bound,  # R
    dim,  # D
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write zeros to the tail."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = ((row >= tl.load(live)) & (row < bound))[:, None] & (column < dim)[None, :]
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32).to(rows.dtype.element_ty)
    tl.store(rows + row.to(tl.int64)[:, None] * dim + column[None, :], zeros, mask=mask)


@triton.jit
def sum_to_tokens(
    rows,  # [R, D]
    y,  # [T, D]
    inverse,  # [N] row of each slot
    topk_weights,  # [T, K], read if WEIGHTED
    live,  # [1], rows before the tail
    dim,  # D
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Write the sum of each token's kept rows, weighted if WEIGHTED, added in float32."""
    if CHAINED:
        wait_for_launch_before()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    kept = tl.load(live)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        row = tl.load(inverse + slot)
        width = tl.where(row < kept, dim, 0)  # a dropped slot reads no columns
        mask = column < width
        value = tl.load(rows + row.to(tl.int64) * dim + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            # A dropped slot's weight may be inf or nan, and 0 times it nan.
            weight = tl.load(topk_weights + slot).to(tl.float32)
            value = tl.where(mask, value * weight, 0.0)
        total += value
    tl.store(y + token * dim + column, rounded(total, y.dtype.element_ty), mask=inside)


@triton.jit
def weigh_to_rows(
    dy,  # [T, D]
    rows,  # [R, D]
    inverse,  # [N] row of each slot
    topk_weights,  # [T, K]
    live,  # [1], rows before the tail
    dim,  # D
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write each token, times the slot's weight, to its rows; the tail is not written."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    kept = tl.load(live)
    value = tl.load(dy + token * dim + column, mask=inside, other=0.0).to(tl.float32)  # [COLUMNS]
    for k in range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k)
        if row < kept:
            w = tl.load(topk_weights + token * TOP_K + k).to(tl.float32)
            target = rows + row.to(tl.int64) * dim + column
            tl.store(target, rounded(value * w, rows.dtype.element_ty), mask=inside)


@triton.jit
def dot_with_rows(
    dy,  # [T, D]
    rows,  # [R, D]
    dweights,  # [T, K]
    inverse,  # [N] row of each slot
    live,  # [1], rows before the tail
    dim,  # D
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the dot product of each token's dy and each of its rows; 0 for a dropped slot."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(inverse + slot)
    width = tl.where(row < tl.load(live), dim, 0)  # a dropped slot reads no columns
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < width
        left = tl.load(dy + slot // TOP_K * dim + column, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(rows + row.to(tl.int64) * dim + column, mask=mask, other=0.0)
        total += left * right.to(tl.float32)
    tl.store(dweights + slot, tl.sum(total))


@triton.jit
def differentiate(
    da,  # [R, F], not weighted
    z,  # [R, PARTS * F]
    dz,  # [R, PARTS * F]
    weighted,  # [R, F]
    dots,  # [R, dots_width]
    order,  # [R] slot of each row
    topk_weights,  # [N], read if WEIGHTED
    live,  # [1], rows before the tail
    ffn_dim,  # F
    dots_width,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write one row of dz, of the weighted activation w * a, and of the row dot <da, a>."""
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

            # f(gate) and f'(gate) times the weighted gradient; with a gate, times `up` as well.
            a, slope = function_and_slope(gate, FUNCTION)
            slope *= gradient * w
            at = dz + row * PARTS * ffn_dim + column
            if PARTS == 2:
                up = tl.load(z + (row * 2 + 1) * ffn_dim + column, mask=mask, other=0.0)
                up = up.to(tl.float32)
                dup = through_clamp(gradient * w * a, up, FUNCTION)
                tl.store(at + ffn_dim, rounded(dup, dz.dtype.element_ty), mask=mask)
                a = a * factor(up, FUNCTION)
                slope = slope * factor(up, FUNCTION)
            tl.store(at, rounded(slope, dz.dtype.element_ty), mask=mask)
            at = weighted + row * ffn_dim + column
            tl.store(at, rounded(a * w, dz.dtype.element_ty), mask=mask)
            total += gradient * a
        tl.store(dots + row * dots_width, tl.sum(total))


@triton.jit(do_not_specialize=["slots"])
def sum_dots(
    dots,  # [R, WIDTH]
    dweights,  # [N]
    inverse,  # [N] row of each slot
    live,  # [1], rows before the tail
    slots,  # N
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # WIDTH, rounded up to a power of two
    CHAINED: tl.constexpr,
):
    """Write the sum over each slot's row of dots; 0 for a dropped slot."""
    if CHAINED:
        wait_for_launch_before()
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(inverse + slot, mask=slot < slots, other=0)  # [SLOTS]
    kept = (slot < slots) & (row < tl.load(live))
    column = tl.arange(0, COLUMNS)
    pointers = dots + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    values = tl.load(pointers, mask=kept[:, None] & (column < WIDTH)[None, :], other=0.0)
    tl.store(dweights + slot, tl.sum(values, 1), mask=slot < slots)


@triton.jit
def bias_dots(
    dy,  # [R, D]
    bias,  # [E, D]
    dots,  # [R, dots_width]
    tiles,  # tile list, see ``_schedule``
    dim,  # D
    dots_width,
    at,  # column of dots
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write column `at` of dots: the dot product of each row of dy and its expert's bias."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles):
        expert, row, end, _ = tile_at(tiles, 1, tile, ROWS)
        r = row + tl.arange(0, ROWS)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            b = tl.load(bias + expert.to(tl.int64) * dim + column, mask=column < dim, other=0.0)
            b = b.to(tl.float32)  # [COLUMNS]
            mask = (r < end)[:, None] & (column < dim)[None, :]
            pointers = dy + r.to(tl.int64)[:, None] * dim + column[None, :]
            tile_dy = tl.load(pointers, mask=mask, other=0.0)  # [ROWS, COLUMNS]
            total += tl.sum(tile_dy.to(tl.float32) * b[None, :], 1)
        tl.store(dots + r.to(tl.int64) * dots_width + at, total, mask=r < end)


@triton.jit
def sum_rows(
    rows,  # [R, width]
    out,  # [E, width]
    offsets,  # [E + 1]
    order,  # [R] slot of each row
    topk_weights,  # [N], read if WEIGHTED
    width,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the sum of each expert's rows, weighted if WEIGHTED; zero if it has none."""
    expert = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)

    # Add rows r, r + ROWS, ... in lane r, and the lanes at the end.
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & (column < width)[None, :]
        pointers = rows + r.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            slot = tl.load(order + r, mask=r < end, other=0)
            weight = tl.load(topk_weights + slot, mask=r < end, other=0.0)
            value *= weight.to(tl.float32)[:, None]
        total += value
    target = out + expert * width + column
    tl.store(target, rounded(tl.sum(total, 0), out.dtype.element_ty), mask=column < width)
