"""The up matmul of an expert layer with its activation, in FP8 for Hopper GPUs, in Gluon.

Matmuls in FP8 share the loaders and the pipeline of the matmuls in 16 bits (``_gluon_pipeline``).
Operands are numbers in e4m3 with float32 scales: one for each 128 columns of a row, and one for
each 128 x 128 of a weight (``tokenyard.fp8``). A slice is 128 numbers deep, so each of its two
halves of 128 columns has one scale a row and one scale of the weight.

Legend: T tokens, R rows, E experts, D model width, F expert width. PARTS is 2 for a gated
activation (gate and up) and 1 otherwise.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from tokenyard_kernels_triton.kernels._activations import factor, function
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
def _multiply_up(
    tensors,
    sizes,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    BIAS: gl.constexpr,
    KEEP_Z: gl.constexpr,
    KEEP_A: gl.constexpr,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute 64 rows of each tile of `up_and_activate`: WARPGROUP selects which 64."""
    operands, results, shared, tiles, queue = tensors
    row_scales, order, weight_scales, bias = operands
    z, z_scales, a_out, a_scales = results
    a, b, full, empty, z_buffers, a_buffers = shared
    dim, ffn_dim = sizes
    blocks = ffn_dim // 128  # of F
    columns = gl.cdiv(blocks * PARTS, 2)
    steps = dim // 128
    done = 0  # slices consumed by all tiles so far
    total_tiles = gl.load(tiles) * columns
    tile = 0  # tiles computed so far
    index = gl.program_id(0)
    while index < total_tiles:
        expert, start, end, n = tile_at(tiles, columns, index, 128)
        row = start + 64 * WARPGROUP
        if row < end:
            # Main loop. The halves are gate and up of the same columns, or adjacent columns.
            block = n * (2 // PARTS)  # of the first half
            apart = blocks if PARTS == 2 else 1  # blocks from the first half to the second
            exists = PARTS == 2 or block + 1 < blocks
            rows = rows_of_scales(order, row, end, TOP_K)
            of_expert = expert * PARTS * blocks  # the first of its blocks of rows
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
                (of_expert + block) * steps,
                gl.where(exists, apart * steps, 0),
                1,
                WARPGROUP,
                STAGES,
            )

            # Epilogue: bias, activation, quantization and stores.
            if BIAS:
                of_block = bias + (of_expert + block) * 128
                first = add_bias(first, of_block, 0, True)
                second = add_bias(second, of_block, apart * 128, exists)
            tma.store_wait(0)  # the last tile's stores have read the buffers
            if PARTS == 2:
                if KEEP_A:
                    act = function(first, FUNCTION, True) * factor(second, FUNCTION)
                    buffer = a_buffers.index(WARPGROUP)
                    store_half(
                        act,
                        a_out,
                        a_scales,
                        blocks,
                        buffer,
                        row,
                        end,
                        0,  # part
                        block * 128,
                        block,
                        True,
                    )
                if KEEP_Z:
                    for part in gl.static_range(2):
                        store_half(
                            first if part == 0 else second,
                            z,
                            z_scales,
                            2 * blocks,
                            z_buffers.index(2 * WARPGROUP + part),
                            row,
                            end,
                            part,
                            block * 128,
                            part * blocks + block,
                            True,
                        )
            else:
                for half in gl.static_range(2):
                    half_tile = first if half == 0 else second
                    if half == 1:
                        tma.store_wait(0)
                    if KEEP_Z:
                        store_half(
                            half_tile,
                            z,
                            z_scales,
                            blocks,
                            z_buffers.index(WARPGROUP),
                            row,
                            end,
                            0,  # part
                            (block + half) * 128,
                            block + half,
                            block + half < blocks,
                        )
                    if KEEP_A:
                        store_half(
                            function(half_tile, FUNCTION, True),
                            a_out,
                            a_scales,
                            blocks,
                            a_buffers.index(WARPGROUP),
                            row,
                            end,
                            0,  # part
                            (block + half) * 128,
                            block + half,
                            block + half < blocks,
                        )
        else:  # the tile has no rows for this warp group
            skip_slices(full, empty, done, steps, STAGES)
        done += steps
        index = next_tile(queue, tile, 4, PROGRAMS)
        tile += 1
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def up_and_activate_fp8(
    x,  # [R, D] rows, or with TOP_K tokens [T, D], in e4m3
    row_scales,  # [R or T, D / 128]
    order,  # [R] slot of each row, or None without TOP_K
    weight,  # [E, PARTS * F, D] in e4m3
    weight_scales,  # [E, PARTS * F / 128, D / 128]
    bias,  # [E, PARTS * F] or None
    z,  # [R, PARTS * F] in e4m3 or 16 bits, or None
    z_scales,  # [R, PARTS * F / 128], or None without z in e4m3
    a_out,  # [R, F] in e4m3
    a_scales,  # [R, F / 128]
    tiles,  # tile list, see ``_schedule``
    dim,  # D
    ffn_dim,  # F
    TOP_K: gl.constexpr,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    BIAS: gl.constexpr,
    KEEP_Z: gl.constexpr,
    KEEP_A: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F], quantized.

    With TOP_K, x and its scales belong to tokens, as in ``_gluon_up.up_and_activate``.
    """
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = left_slices(x, weight.dtype, TOP_K, 128, STAGES)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    a_buffers = gl.allocate_shared_memory(a_out.dtype, [2] + a_out.block_type.shape, a_out.layout)
    z_buffers = a_buffers
    if KEEP_Z:
        z_buffers = gl.allocate_shared_memory(z.dtype, [2 * PARTS] + z.block_type.shape, z.layout)
    full = barriers(STAGES, arrivals(TOP_K))  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    queue = tile_queue(loading_warps(TOP_K))
    sizes = (dim, ffn_dim)
    tensors = (
        (row_scales, order, weight_scales, bias),
        (z, z_scales, a_out, a_scales),
        (a, b, full, empty, z_buffers, a_buffers),
        tiles,
        queue,
    )
    operands = (x, order, weight, a, b, full, empty, tiles, queue)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply_up,
                (
                    tensors,
                    sizes,
                    FUNCTION,
                    PARTS,
                    BIAS,
                    KEEP_Z,
                    KEEP_A,
                    TOP_K,
                    0,  # WARPGROUP
                    PROGRAMS,
                    STAGES,
                ),
            ),
            (
                _multiply_up,
                (
                    tensors,
                    sizes,
                    FUNCTION,
                    PARTS,
                    BIAS,
                    KEEP_Z,
                    KEEP_A,
                    TOP_K,
                    1,  # WARPGROUP
                    PROGRAMS,
                    STAGES,
                ),
            ),
            (
                load_row_tiles,  # B_BY_DEPTH is False
                (operands, sizes, PARTS, False, TOP_K, 128, 256, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )
