"""Loads and stores of matrix tiles by pointers, for any GPU, and arithmetic on tiles."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on a CPU."""


@triton.jit
def row_pointers(
    base,  # [R, PARTS * width]
    row,
    end,
    part,
    column,
    width,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the pointers to a tile [ROWS, COLUMNS] of a part, and a mask of those that exist."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    first = (r.to(tl.int64) * PARTS + part) * width
    return base + first[:, None] + c[None, :], (r < end)[:, None] & (c < width)[None, :]


@triton.jit
def load_rows(
    source,  # [R, width]
    row,
    end,
    column,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a tile [ROWS, COLUMNS] of rows; zero from row `end` on."""
    pointers, mask = row_pointers(
        source,
        row,
        end,
        0,  # part
        column,
        width,
        1,  # PARTS
        ROWS,
        COLUMNS,
    )
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(
    target,  # [R, PARTS * width]
    tile,  # [ROWS, COLUMNS]
    row,
    end,
    part,
    column,
    width,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of a part; nothing from row `end` on."""
    pointers, mask = row_pointers(
        target,
        row,
        end,
        part,
        column,
        width,
        PARTS,
        ROWS,
        COLUMNS,
    )
    tl.store(pointers, tile, mask=mask)


@triton.jit
def load_weight(
    source,  # [E, PARTS * rows, columns]
    expert,
    row,
    column,
    rows,
    columns,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return [PARTS * ROWS, COLUMNS]: the same tile of each part of an expert's weight."""
    index = tl.arange(0, PARTS * ROWS)
    r = row + index % ROWS
    c = column + tl.arange(0, COLUMNS)
    first = (expert.to(tl.int64) * PARTS + index // ROWS) * rows + r
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    return tl.load(source + first[:, None] * columns + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_weight(
    target,  # [E, rows, columns]
    tile,  # [ROWS, COLUMNS]
    expert,
    row,
    column,
    rows,
    columns,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write a float32 tile of an expert's weight, or add to it."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    first = expert.to(tl.int64) * rows + r
    put(target + first[:, None] * columns + c[None, :], tile, mask, ADD, TYPE)


@triton.jit
def put(pointers, tile, mask, ADD: tl.constexpr, TYPE: tl.constexpr):
    """Write a float32 tile in a narrower type, or add it to float32 numbers."""
    if ADD:
        tl.atomic_add(pointers, tile, mask=mask, sem="relaxed")  # without a load
    else:
        tl.store(pointers, rounded(tile, TYPE), mask=mask)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Return total + left @ right, accumulated in float32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if PRECISION == "ieee":
        # Adding slice by slice errs less. The fma keeps the compiler from folding a plain sum
        # into the dot.
        return tl.fma(tl.dot(left, right, input_precision=PRECISION), 1.0, total)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def rounded(value, TYPE: tl.constexpr):
    """Return float32 values in a narrower type, rounded to nearest even."""
    # The interpreter would truncate, and lose NaN, so that these round the bits themselves.
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    if INTERPRETED and tl.float8e4nv == TYPE:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        narrow = bits.to(tl.float32, bitcast=True).to(TYPE).to(tl.uint8, bitcast=True)
        return tl.where(value == value, narrow, 0x7F).to(tl.uint8).to(TYPE, bitcast=True)
    return value.to(TYPE)
