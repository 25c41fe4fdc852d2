"""Rows times the weights of their experts, in FP8 for Hopper GPUs, in Gluon.

Operands are those of ``_gluon_fp8_up``. Legend: T tokens, R rows, E experts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from tokenyard_kernels_triton.kernels._gluon_fp8_tiles import (
    accumulate,
    add_bias,
    registers,
    rows_of_scales,
    store_half,
)
from tokenyard_kernels_triton.kernels._gluon_loads import (
    arrivals,
    left_slices,
    load_row_tiles,
    loading_warps,
)
from tokenyard_kernels_triton.kernels._gluon_pipeline import barriers, skip_slices
from tokenyard_kernels_triton.kernels._gluon_queue import next_tile, tile_queue
from tokenyard_kernels_triton.kernels._schedule import tile_at


@gluon.jit
def _multiply_rows(
    tensors,
    sizes,
    BIAS: gl.constexpr,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `times_weight`: WARPGROUP selects which 64."""
    operands, out, shared, tiles, queue = tensors
    row_scales, order, weight_scales, bias = operands
    a, b, full, empty, buffers = shared
    depth, width, next_column, next_slice = sizes
    blocks = width // 128
    columns = gl.cdiv(width, 256)
    steps = depth // 128
    done = 0  # slices consumed by all tiles so far
    total_tiles = gl.load(tiles) * columns
    tile = 0  # tiles computed so far
    index = gl.program_id(0)
    while index < total_tiles:
        expert, start, end, n = tile_at(tiles, columns, index, 128)
        row = start + 64 * WARPGROUP
        if row < end:
            # Main loop.
            exists = 2 * n + 1 < blocks
            rows = rows_of_scales(order, row, end, TOP_K)
            first, second = accumulate(
                a,
                b,
                full,
                empty,
                done,
                steps,
                row_scales,
                rows * steps,
                weight_scales,
                expert * blocks * steps + 2 * n * next_column,
                gl.where(exists, next_column, 0),
                next_slice,
                WARPGROUP,
                STAGES,
            )

            # Epilogue: bias and stores.
            if BIAS:
                of_tile = bias + expert.to(gl.int64) * width + n * 256
                first = add_bias(first, of_tile, 0, True)
                second = add_bias(second, of_tile, 128, exists)
            for half in gl.static_range(2):
                # Wait until the store that used this buffer has read it.
                tma.store_wait(BUFFERS - 1)
                store_half(
                    first if half == 0 else second,
                    out,
                    None,
                    0,
                    buffers.index(BUFFERS * WARPGROUP + half % BUFFERS),
                    row,
                    end,
                    0,  # part
                    n * 256 + half * 128,
                    0,
                    True,
                )
        else:  # the tile has no rows for this warp group
            skip_slices(full, empty, done, steps, STAGES)
        done += steps
        index = next_tile(queue, tile, 4, PROGRAMS)
        tile += 1
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def times_weight_fp8(
    left,  # [R, depth] rows, or with TOP_K tokens [T, depth], in e4m3
    row_scales,  # [R or T, depth / 128]
    order,  # [R] slot of each row, or None without TOP_K
    weight,  # [E, width, depth] in e4m3
    weight_scales,  # [E, width / 128, depth / 128], or transposed
    bias,  # [E, width] or None
    out,  # [R, width] in 16 bits
    tiles,  # tile list, see ``_schedule``
    depth,
    width,
    next_column,  # distance between the scales of two blocks of columns
    next_slice,  # distance between the scales of two slices
    TOP_K: gl.constexpr,
    BIAS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write out = left @ weight.T + bias, with each expert's weight and bias for its rows."""
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = left_slices(left, weight.dtype, TOP_K, 128, STAGES)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full = barriers(STAGES, arrivals(TOP_K))  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    queue = tile_queue(loading_warps(TOP_K))
    sizes = (depth, width, next_column, next_slice)
    shared = (a, b, full, empty, buffers)
    tensors = ((row_scales, order, weight_scales, bias), out, shared, tiles, queue)
    operands = (left, order, weight, a, b, full, empty, tiles, queue)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply_rows,
                (
                    tensors,
                    sizes,
                    BIAS,
                    TOP_K,
                    0,  # WARPGROUP
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
                    BIAS,
                    TOP_K,
                    1,  # WARPGROUP
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                load_row_tiles,  # PARTS is 1, B_BY_DEPTH is False
                (operands, (depth, width), 1, False, TOP_K, 128, 256, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )
