"""The loaders of the matmuls for Hopper GPUs, in Gluon: one warp loads every slice by TMA.

With TOP_K, one operand holds tokens, TOP_K rows for each, and ``_gluon_gather`` loads instead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tokenyard_kernels_triton.kernels._gluon_gather import gather_column_tiles, gather_row_tiles
from tokenyard_kernels_triton.kernels._gluon_pipeline import load, ragged_at
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
        left, _, weight, a, b, full, empty, tiles = operands
        depth, width = sizes
        columns = gl.cdiv(width, COLUMNS // PARTS)
        done = 0  # slices loaded by all tiles so far
        for index in range(gl.program_id(0), gl.load(tiles) * columns, PROGRAMS):
            expert, row, end, n = tile_at(tiles, columns, index, 128)
            column = n * (COLUMNS // PARTS)
            for k in range(0, depth, DEPTH):
                if B_BY_DEPTH:
                    at = [expert, 0, k, column]
                else:
                    at = [expert, 0, column, k]
                # The warp groups' boxes differ in rows.
                upper = ragged_at(row, end, 0, k)
                lower = ragged_at(row + 64, end, 0, k)
                done = load_slice(
                    left,
                    weight,
                    (upper, lower),
                    (at,),
                    a,
                    b,
                    full,
                    empty,
                    done,
                    STAGES,
                )


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
        left, right, _, a, b, full, empty, offsets, by_rows = operands
        num_experts, rows, columns = sizes
        m_tiles = gl.cdiv(rows, 128)
        n_tiles = gl.cdiv(columns, COLUMNS)
        per_expert = m_tiles * n_tiles
        done = 0  # slices loaded by all tiles so far
        for index in range(gl.program_id(0), num_experts * per_expert, PROGRAMS):
            expert = gl.load(by_rows + index // per_expert)
            m, n = matrix_tile_at(m_tiles, n_tiles, index % per_expert, GROUP)
            end = gl.load(offsets + expert + 1)
            for k in range(gl.load(offsets + expert), end, DEPTH):
                # The warp groups' boxes differ in columns.
                one = ragged_at(k, end, 0, m * 128)
                two = ragged_at(k, end, 0, m * 128 + 64)
                done = load_slice(
                    left,
                    right,
                    (one, two),
                    (ragged_at(k, end, 0, n * COLUMNS),),
                    a,
                    b,
                    full,
                    empty,
                    done,
                    STAGES,
                )


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
