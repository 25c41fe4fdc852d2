"""Rows times the weights of their experts, for Hopper GPUs, in Gluon: down, and gradients of rows.

The file is like ``_gluon_up``. Legend: T tokens, R rows, E experts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from tokenyard_kernels_triton.kernels._gluon_loads import (
    arrivals,
    left_slices,
    load_row_tiles,
    loading_warps,
    registers,
)
from tokenyard_kernels_triton.kernels._gluon_pipeline import (
    accumulate,
    add_bias,
    barriers,
    ragged_at,
    skip_slices,
    store,
    take_chunk,
)
from tokenyard_kernels_triton.kernels._gluon_queue import next_tile, tile_queue
from tokenyard_kernels_triton.kernels._schedule import tile_at


@gluon.jit
def _multiply_rows(
    tensors,
    sizes,
    B_BY_DEPTH: gl.constexpr,
    BIAS: gl.constexpr,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `times_weight`: WARPGROUP selects which 64."""
    bias, out, a, b, full, empty, buffers, tiles, queue = tensors
    depth, width = sizes
    columns = gl.cdiv(width, COLUMNS)
    steps = gl.cdiv(depth, DEPTH)
    done = 0  # slices consumed by all tiles so far
    stored = 0  # chunks stored by all tiles so far
    total_tiles = gl.load(tiles) * columns
    tile = 0  # tiles computed so far
    index = gl.program_id(0)
    while index < total_tiles:
        expert, first, end, n = tile_at(tiles, columns, index, 128)
        row = first + 64 * WARPGROUP
        if row < end:
            # Main loop.
            total = accumulate(
                a,
                b,
                full,
                empty,
                done,
                steps,
                False,  # A_BY_DEPTH
                B_BY_DEPTH,
                TOP_K > 0,  # GATHERED
                WARPGROUP,
                DEPTH,
                COLUMNS,
                STAGES,
            )

            # Epilogue: bias and stores, CHUNK columns at a time.
            for i in gl.static_range(COLUMNS // CHUNK):
                column = n * COLUMNS + i * CHUNK
                chunk = take_chunk(total, i, COLUMNS, CHUNK)
                if BIAS:
                    chunk = add_bias(chunk, bias + expert * width, column, width, CHUNK)
                # Wait until the store that used this buffer has read it.
                tma.store_wait(BUFFERS - 1)
                buffer = buffers.index(BUFFERS * WARPGROUP + stored % BUFFERS)
                buffer.reshape([64, CHUNK]).store(chunk.to(a.dtype))
                fence_async_shared()
                store(out, ragged_at(row, end, 0, column), buffer)
                stored += 1
        else:  # the tile has no rows for this warp group
            skip_slices(full, empty, done, steps, STAGES)
        done += steps
        index = next_tile(queue, tile, 4, PROGRAMS)
        tile += 1
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def times_weight(
    left,  # [R, depth] rows, or with TOP_K tokens [T, depth]
    order,  # [R] slot of each row, or None without TOP_K
    weight,  # [E, depth, width] if B_BY_DEPTH, else [E, width, depth]
    bias,  # [E, width] or None
    out,  # [R, width]
    tiles,  # tile list, see ``_schedule``
    depth,
    width,
    TOP_K: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    BIAS: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write out = left @ weight + bias, with each expert's weight and bias for its rows."""
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = left_slices(left, weight.dtype, TOP_K, DEPTH, STAGES)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    buffers = gl.allocate_shared_memory(
        weight.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout
    )
    full = barriers(STAGES, arrivals(TOP_K))  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    queue = tile_queue(loading_warps(TOP_K))
    tensors = (bias, out, a, b, full, empty, buffers, tiles, queue)
    sizes = (depth, width)
    operands = (left, order, weight, a, b, full, empty, tiles, queue)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply_rows,
                (
                    tensors,
                    sizes,
                    B_BY_DEPTH,
                    BIAS,
                    TOP_K,
                    0,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _multiply_rows,
                (
                    tensors,
                    sizes,
                    B_BY_DEPTH,
                    BIAS,
                    TOP_K,
                    1,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                load_row_tiles,  # PARTS is 1
                (operands, sizes, 1, B_BY_DEPTH, TOP_K, DEPTH, COLUMNS, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )
