"""Gradients of the weights of experts, for Hopper GPUs, in Gluon.

The file is like ``_gluon_up``. Legend: T tokens, R rows, E experts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from tokenyard_kernels_triton.kernels._gluon_loads import (
    arrivals,
    left_slices,
    load_column_tiles,
    loading_warps,
    registers,
)
from tokenyard_kernels_triton.kernels._gluon_pipeline import (
    accumulate,
    add,
    barriers,
    store,
    take_chunk,
)
from tokenyard_kernels_triton.kernels._gluon_queue import next_tile, tile_queue
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at


@gluon.jit
def _multiply_columns(
    tensors,
    sizes,
    OUT_BY_COLUMNS: gl.constexpr,
    ADD: gl.constexpr,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `weight_gradient`: WARPGROUP selects which 64."""
    out, a, b, full, empty, buffers, offsets, by_rows, queue = tensors
    num_experts, rows, columns = sizes
    m_tiles = gl.cdiv(rows, 128)
    n_tiles = gl.cdiv(columns, COLUMNS)
    per_expert = m_tiles * n_tiles
    done = 0  # slices consumed by all tiles so far
    stored = 0  # chunks stored by all tiles so far
    tile = 0  # tiles computed so far
    index = gl.program_id(0)
    while index < num_experts * per_expert:
        expert = gl.load(by_rows + index // per_expert)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % per_expert, GROUP)
        row = m * 128 + WARPGROUP * 64
        steps = gl.cdiv(gl.load(offsets + expert + 1) - gl.load(offsets + expert), DEPTH)

        # Main loop over the expert's rows; the sum is zero if it has none.
        total = accumulate(
            a,
            b,
            full,
            empty,
            done,
            steps,
            True,  # A_BY_DEPTH
            True,  # B_BY_DEPTH
            TOP_K > 0,  # GATHERED
            WARPGROUP,
            DEPTH,
            COLUMNS,
            STAGES,
        )

        # Epilogue: store CHUNK columns at a time, or add them.
        for i in gl.static_range(COLUMNS // CHUNK):
            # Wait until the store that used this buffer has read it.
            tma.store_wait(BUFFERS - 1)
            buffer = buffers.index(BUFFERS * WARPGROUP + stored % BUFFERS)
            chunk = take_chunk(total, i, COLUMNS, CHUNK).to(out.dtype)
            column = n * COLUMNS + i * CHUNK
            if OUT_BY_COLUMNS:
                buffer.reshape([CHUNK, 64]).permute([1, 0]).store(chunk)
                at = [expert, 0, column, row]
            else:
                buffer.reshape([64, CHUNK]).store(chunk)
                at = [expert, 0, row, column]
            fence_async_shared()
            if ADD:
                add(out, at, buffer)
            else:
                store(out, at, buffer)
            stored += 1
        done += steps
        index = next_tile(queue, tile, 4, PROGRAMS)
        tile += 1
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def weight_gradient(
    left,  # [R, rows], or with TOP_K tokens [T, rows]
    right,  # [R, columns]
    order,  # [R] slot of each row, or None without TOP_K
    out,  # [E, rows, columns], or [E, columns, rows] if OUT_BY_COLUMNS
    offsets,  # [E + 1]
    by_rows,  # [E] experts, those with most rows first
    counter,  # of a tile list, see ``_gluon_queue``
    num_experts,  # E
    rows,
    columns,
    OUT_BY_COLUMNS: gl.constexpr,
    ADD: gl.constexpr,
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write out[e] = left[rows of e].T @ right[rows of e] for each expert e, or add that to it."""
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = left_slices(left, right.dtype, TOP_K, DEPTH, STAGES)
    b = gl.allocate_shared_memory(right.dtype, [STAGES] + right.block_type.shape, right.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full = barriers(STAGES, arrivals(TOP_K))  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    queue = tile_queue(loading_warps(TOP_K))
    tensors = (out, a, b, full, empty, buffers, offsets, by_rows, queue)
    sizes = (num_experts, rows, columns)
    operands = (left, right, order, a, b, full, empty, offsets, by_rows, counter, queue)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply_columns,
                (
                    tensors,
                    sizes,
                    OUT_BY_COLUMNS,
                    ADD,
                    TOP_K,
                    0,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    GROUP,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _multiply_columns,
                (
                    tensors,
                    sizes,
                    OUT_BY_COLUMNS,
                    ADD,
                    TOP_K,
                    1,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    GROUP,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                load_column_tiles,
                (operands, sizes, TOP_K, DEPTH, COLUMNS, GROUP, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )
