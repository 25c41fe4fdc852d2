"""Reading and writing tiles of matrices by pointers, which every GPU can; and what the interpreter needs besides."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on a CPU."""


@triton.jit
def row_pointers(
    base,
    row,
    end,
    part,
    column,
    width,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return pointers to a tile [ROWS, COLUMNS] of rows [R, PARTS * width], within a part, and which of them exist."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    first = (r.to(tl.int64) * PARTS + part) * width
    return base + first[:, None] + c[None, :], (r < end)[:, None] & (c < width)[None, :]


@triton.jit
def load_rows(
    source,
    row,
    end,
    column,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Read a tile [ROWS, COLUMNS] of rows [R, width]; zero at and past row `end`."""
    pointers, mask = row_pointers(
        source,
        row,
        end,
        0,
        column,
        width,
        1,
        ROWS,
        COLUMNS,
    )
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(
    target,
    tile,
    row,
    end,
    part,
    column,
    width,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile [ROWS, COLUMNS] of a part; nothing at and past row `end`."""
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
    source,
    expert,
    row,
    column,
    rows,
    columns,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Read [PARTS * ROWS, COLUMNS]: the same tile of each part, `rows` by `columns`, of an expert's weight."""
    index = tl.arange(0, PARTS * ROWS)
    r, c = row + index % ROWS, column + tl.arange(0, COLUMNS)
    first = (expert.to(tl.int64) * PARTS + index // ROWS) * rows + r
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    return tl.load(source + first[:, None] * columns + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_weight(
    target,
    tile,
    expert,
    row,
    column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile [ROWS, COLUMNS] of an expert's weight, `rows` by `columns`."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    first = expert.to(tl.int64) * rows + r
    tl.store(target + first[:, None] * columns + c[None, :], tile, mask=mask)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """Return total + left @ right, accumulated in float32."""
    if INTERPRETED:  # which would multiply the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    if (
        PRECISION == "ieee"
    ):  # slice by slice, which errs less; by fma, since a plain sum is folded into the product
        return tl.fma(tl.dot(left, right, input_precision=PRECISION), 1.0, total)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def rounded(value, TYPE: tl.constexpr):
    """Return float32 values in a narrower type, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == TYPE:  # which would cut the last bits off
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    if INTERPRETED and tl.float8e4nv == TYPE:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(TYPE)
