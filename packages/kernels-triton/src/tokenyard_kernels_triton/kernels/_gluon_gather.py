"""Loaders that gather an operand's rows straight from the tokens.

Four warps gather the rows of a slice by asynchronous copies of 16 bytes (cp.async), while TMA loads
the other operand. Each thread's copies arrive at the slice's barrier on their own. After a warp
group has waited there, a fence makes the copies visible to its matmuls.

Gathering saves a copy of the tokens to rows, and costs a matmul about 7 % of its time. It pays off
for narrow experts only, because the copy takes as long for narrow experts as for wide ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tokenyard_kernels_triton.kernels._gluon_pipeline import load, ragged_at
from tokenyard_kernels_triton.kernels._gluon_queue import (
    claim_tile,
    publish_tile,
    slices_before_claim,
)
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at, tile_at

# Triton 3.6 has the second name only.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _box(dtype):
    """Return the layout of 64 rows by 128 bytes. A thread copies 16 bytes at a time."""
    return gl.BlockedLayout([1, 128 // dtype.primitive_bitwidth], [4, 8], [4, 1], [1, 0])


@gluon.jit
def gather_row_tiles(
    operands,
    sizes,
    PARTS: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every output tile of rows @ weight, gathering the rows from tokens."""
    x, order, weight, a, b, full, empty, tiles, queue = operands
    depth, width = sizes
    columns = gl.cdiv(width, COLUMNS // PARTS)
    total = gl.load(tiles) * columns
    steps = gl.cdiv(depth, DEPTH)
    claim_at = DEPTH * slices_before_claim(steps)
    done = 0  # slices loaded by all tiles so far
    tile = 0  # tiles loaded so far
    index = gl.program_id(0)
    while index < total:
        expert, row, end, n = tile_at(tiles, columns, index, 128)
        column = n * (COLUMNS // PARTS)

        # The tokens of both warp groups' rows are the same in every slice.
        box: gl.constexpr = _box(x.dtype.element_ty)
        upper, in_upper = _tokens_at(order, row, end, TOP_K, box)  # [64]
        lower, in_lower = _tokens_at(order, row + 64, end, TOP_K, box)  # [64]
        rows = (upper, in_upper, lower, in_lower)
        box_at = (expert, column)
        shared = (a, b, full, empty)
        for k in range(0, claim_at, DEPTH):
            _gather_rows(x, weight, rows, box_at, k, depth, shared, done, B_BY_DEPTH, STAGES)
            done += 1
        claimed = claim_tile(tiles + 1, 4)
        for k in range(claim_at, depth, DEPTH):
            _gather_rows(x, weight, rows, box_at, k, depth, shared, done, B_BY_DEPTH, STAGES)
            done += 1
        index = publish_tile(queue, tiles + 1, claimed, tile, total, 4, PROGRAMS)
        tile += 1


@gluon.jit
def _gather_rows(
    x,  # [T, depth]
    weight,
    rows,  # tokens and masks of both warp groups
    box_at,  # the expert, and the first column of its weight
    k,  # the slice's first number of the reduction dimension
    depth,
    shared,
    done,  # slices loaded before
    B_BY_DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load a slice of rows @ weight."""
    upper, in_upper, lower, in_lower = rows
    expert, column = box_at
    a, b, full, empty = shared
    if B_BY_DEPTH:
        at = [expert, 0, k, column]
    else:
        at = [expert, 0, column, k]

    # Wait until both warp groups have consumed the stage's previous slice.
    stage = done % STAGES
    ready = full.index(stage)
    mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)

    # The weight by TMA, then the rows by asynchronous copies.
    mbarrier.expect(ready, weight.block_type.nbytes)
    load(weight, at, ready, b.index(stage))
    _gather(x, upper, in_upper, k, depth, a.index(2 * stage))
    _gather(x, lower, in_lower, k, depth, a.index(2 * stage + 1))
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def gather_column_tiles(
    operands,
    sizes,
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every tile of a weight gradient, gathering the left operand from tokens.

    Its boxes have 128 columns, half as many as those of the right one.
    """
    left, right, order, a, b, full, empty, offsets, by_rows, counter, queue = operands
    num_experts, rows, columns = sizes
    m_tiles = gl.cdiv(rows, 128)
    n_tiles = gl.cdiv(columns, COLUMNS)
    per_expert = m_tiles * n_tiles
    total = num_experts * per_expert
    shared = (a, b, full, empty)
    done = 0  # slices loaded by all tiles so far
    tile = 0  # tiles loaded so far
    index = gl.program_id(0)
    while index < total:
        expert = gl.load(by_rows + index // per_expert)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % per_expert, GROUP)
        first = gl.load(offsets + expert)
        end = gl.load(offsets + expert + 1)
        claim_at = first + DEPTH * slices_before_claim(gl.cdiv(end - first, DEPTH))
        matrices = (left, right, order)
        at = (m * 128, n * COLUMNS)
        box: gl.constexpr = _box(b.dtype)
        tokens, inside = _tokens_at(order, first, end, TOP_K, box)  # [64]
        for k in range(first, claim_at, DEPTH):
            tokens, inside = _gather_columns(
                matrices, at, tokens, inside, k, end, rows, shared, done, TOP_K, DEPTH, STAGES
            )
            done += 1
        claimed = claim_tile(counter, 4)
        for k in range(claim_at, end, DEPTH):
            tokens, inside = _gather_columns(
                matrices, at, tokens, inside, k, end, rows, shared, done, TOP_K, DEPTH, STAGES
            )
            done += 1
        index = publish_tile(queue, counter, claimed, tile, total, 4, PROGRAMS)
        tile += 1


@gluon.jit
def _gather_columns(
    matrices,
    at,  # the first columns of the left and the right operand
    tokens,  # [64] of the slice
    inside,  # [64], which of its rows exist
    k,  # its first row
    end,
    width,  # of the left operand
    shared,
    done,  # slices loaded before
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load a slice of a weight gradient, and return the next slice's tokens."""
    left, right, order = matrices
    m, n = at
    a, b, full, empty = shared

    # Prefetch the next slice's token ids while this slice waits for its stage.
    box: gl.constexpr = _box(b.dtype)
    next_tokens, next_inside = _tokens_at(order, k + DEPTH, end, TOP_K, box)

    # Wait until both warp groups have consumed the stage's previous slice.
    stage = done % STAGES
    ready = full.index(stage)
    mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)

    # The right operand by TMA, the left one by asynchronous copies of 64 columns at a time.
    mbarrier.expect(ready, right.block_type.nbytes)
    load(right, ragged_at(k, end, 0, n), ready, b.index(stage))
    for half in gl.static_range(2):
        _gather(left, tokens, inside, m + 64 * half, width, a.index(2 * stage + half))
    async_copy.mbarrier_arrive(ready, increment_count=False)
    return next_tokens, next_inside


@gluon.jit
def _tokens_at(order, row, end, TOP_K: gl.constexpr, BOX: gl.constexpr):
    """Return the tokens [64] of the rows from `row` on, and a mask of the rows before `end`."""
    r = row + gl.arange(0, 64, gl.SliceLayout(1, BOX))
    return gl.load(order + r, mask=r < end, other=0) // TOP_K, r < end


@gluon.jit
def _gather(
    x,  # [T, dim]
    tokens,  # [64]
    inside,  # [64], which of the rows exist
    first,  # column of x, a multiple of 128 bytes
    dim,
    target,  # [64, 64], or [64, 128] in 8 bits, in shared memory
):
    """Start copying 128 bytes of 64 tokens, from column `first` on; zeros outside of x."""
    # In units of 16 bytes, so that the compiler sees that every copy is aligned. It keeps products
    # of 32 bits for all slices, in half of the registers that 64 bits take.
    BOX: gl.constexpr = _box(x.dtype.element_ty)
    UNIT: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    units = dim // UNIT
    column = gl.arange(0, 8 * UNIT, gl.SliceLayout(0, BOX))
    start = (tokens * units + first // UNIT).to(gl.int64) * UNIT
    pointers = x + start[:, None] + column[None, :]
    mask = inside[:, None] & ((first + column) // UNIT < units)[None, :]
    _copy(target, pointers, mask=mask)
