"""The loaders of the matmuls for Hopper GPUs, in Gluon: one warp loads every slice by TMA.

With TOP_K, one operand holds tokens, TOP_K rows for each, and ``_gluon_gather`` loads instead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tokenyard_kernels_triton.kernels._gluon_gather import gather_column_tiles, gather_row_tiles
from tokenyard_kernels_triton.kernels._gluon_pipeline import load, ragged_at
from tokenyard_kernels_triton.kernels._gluon_queue import (
    claim_tile,
    publish_tile,
    slices_before_claim,
)
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at, tile_at


@gluon.constexpr_function
def loading_warps(TOP_K):
    """Return the number of warps that load."""
    return 4 if TOP_K else 1


@gluon.constexpr_function
def arrivals(TOP_K):
    """Return the arrivals that complete a slice: TMA's, and one of each thread that copies."""
    return 129 if TOP_K else 1


@gluon.constexpr_function
def registers(TOP_K):
    """Return the registers per thread: of the second warp group, and of the loader.

    With 216 registers, matmuls that gather spill with some activations.
    """
    return [224, 56] if TOP_K else [240, 24]


@gluon.jit
def left_slices(
    rows,
    dtype: gl.constexpr,
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Allocate the left operand's slices, two for each stage, one for each warp group.

    A slice is a box of the descriptor `rows`, or [64, DEPTH] if it is gathered from tokens.
    """
    if TOP_K:
        layout: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, rank=2)
        return gl.allocate_shared_memory(dtype, [2 * STAGES, 64, DEPTH], layout)
    else:
        return gl.allocate_shared_memory(dtype, [2 * STAGES] + rows.block_type.shape, rows.layout)


@gluon.jit
def load_row_tiles(
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
    """Load the slices of every output tile of rows @ weight."""
    if TOP_K:
        gather_row_tiles(
            operands,
            sizes,
            PARTS,
            B_BY_DEPTH,
            TOP_K,
            DEPTH,
            COLUMNS,
            PROGRAMS,
            STAGES,
        )
    else:
        left, _, weight, a, b, full, empty, tiles, queue = operands
        depth, width = sizes
        columns = gl.cdiv(width, COLUMNS // PARTS)
        total = gl.load(tiles) * columns
        claim_at = DEPTH * slices_before_claim(gl.cdiv(depth, DEPTH))
        shared = (a, b, full, empty)
        done = 0  # slices loaded by all tiles so far
        tile = 0  # tiles loaded so far
        index = gl.program_id(0)
        while index < total:
            expert, row, end, n = tile_at(tiles, columns, index, 128)
            at = (expert, row, end, n * (COLUMNS // PARTS))
            for k in range(0, claim_at, DEPTH):
                done = _load_rows(left, weight, at, k, shared, done, B_BY_DEPTH, STAGES)
            claimed = claim_tile(tiles + 1, 1)
            for k in range(claim_at, depth, DEPTH):
                done = _load_rows(left, weight, at, k, shared, done, B_BY_DEPTH, STAGES)
            index = publish_tile(queue, tiles + 1, claimed, tile, total, 1, PROGRAMS)
            tile += 1


@gluon.jit
def _load_rows(
    left,
    weight,
    at,  # the expert, the first row and the end of its rows, and the first column of its weight
    k,  # the slice's first number of the reduction dimension
    shared,
    done,  # slices loaded before
    B_BY_DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load a slice of rows @ weight, and return the next slice's number."""
    expert, row, end, column = at
    a, b, full, empty = shared
    if B_BY_DEPTH:
        box = [expert, 0, k, column]
    else:
        box = [expert, 0, column, k]
    # The warp groups' boxes differ in rows.
    boxes = (ragged_at(row, end, 0, k), ragged_at(row + 64, end, 0, k))
    return load_slice(left, weight, boxes, (box,), a, b, full, empty, done, STAGES)


@gluon.jit
def load_column_tiles(
    operands,
    sizes,
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every tile of a weight gradient."""
    if TOP_K:
        gather_column_tiles(
            operands,
            sizes,
            TOP_K,
            DEPTH,
            COLUMNS,
            GROUP,
            PROGRAMS,
            STAGES,
        )
    else:
        left, right, _, a, b, full, empty, offsets, by_rows, counter, queue = operands
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
            at = (m * 128, n * COLUMNS)
            first = gl.load(offsets + expert)
            end = gl.load(offsets + expert + 1)
            claim_at = first + DEPTH * slices_before_claim(gl.cdiv(end - first, DEPTH))
            for k in range(first, claim_at, DEPTH):
                done = _load_columns(left, right, at, k, end, shared, done, STAGES)
            claimed = claim_tile(counter, 1)
            for k in range(claim_at, end, DEPTH):
                done = _load_columns(left, right, at, k, end, shared, done, STAGES)
            index = publish_tile(queue, counter, claimed, tile, total, 1, PROGRAMS)
            tile += 1


@gluon.jit
def _load_columns(
    left,
    right,
    at,  # the first columns of the left and the right operand
    k,  # the slice's first row
    end,
    shared,
    done,  # slices loaded before
    STAGES: gl.constexpr,
):
    """Load a slice of a weight gradient, and return the next slice's number."""
    m, n = at
    a, b, full, empty = shared
    # The warp groups' boxes differ in columns.
    boxes = (ragged_at(k, end, 0, m), ragged_at(k, end, 0, m + 64))
    box = ragged_at(k, end, 0, n)
    return load_slice(left, right, boxes, (box,), a, b, full, empty, done, STAGES)


@gluon.jit
def load_slice(
    left,
    right,
    at_left,  # coordinates of two boxes, one for each warp group
    at_right,  # coordinates of the boxes of `right`
    a,  # [2 * STAGES, ...] boxes of `left` in shared memory
    b,  # [STAGES * len(at_right), ...] boxes of `right` in shared memory
    full,
    empty,
    done,
    STAGES: gl.constexpr,
):
    """Load slice number `done` of both operands, and return the next slice's number."""
    # Wait until both warp groups have consumed the stage's previous slice.
    stage = done % STAGES
    ready = full.index(stage)
    mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)

    # TMA arrives at the barrier when all bytes of the boxes are there.
    BOXES: gl.constexpr = len(at_right)
    mbarrier.expect(ready, 2 * left.block_type.nbytes + BOXES * right.block_type.nbytes)
    for half in gl.static_range(2):
        load(left, at_left[half], ready, a.index(2 * stage + half))
    for box in gl.static_range(BOXES):
        load(right, at_right[box], ready, b.index(BOXES * stage + box))
    return done + 1
