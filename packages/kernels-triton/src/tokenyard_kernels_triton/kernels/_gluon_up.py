"""The up matmul of an expert layer with its activation, for Hopper GPUs, in Gluon.

``_gluon_pipeline`` describes the warp-specialized pipeline. `_multiply_up` is what the two warp
groups run. `up_and_activate` allocates shared memory, and starts them and the loader. The files of
the other matmuls are alike.

Legend: T tokens, R rows, E experts, D model width, F expert width. PARTS is 2 for a gated
activation (gate and up) and 1 otherwise.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from tokenyard_kernels_triton.kernels._activations import factor, function
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
    round_and_widen,
    round_pairs,
    skip_slices,
    store,
    take_chunk,
)
from tokenyard_kernels_triton.kernels._gluon_queue import next_tile, tile_queue
from tokenyard_kernels_triton.kernels._schedule import tile_at


@gluon.jit
def _activate_and_store(
    total,  # [64, COLUMNS] float32
    bias,  # [E, PARTS * F], or None
    expert,
    width,  # F
    z,  # [R, PARTS * F]
    a_out,  # [R, F]
    buffers,  # [2 * BUFFERS * (PARTS + 1), 64, CHUNK] in shared memory
    buffer,  # the first of PARTS + 1 buffers to use
    row,
    end,
    first,  # the tile's first column of F
    INDEX: gl.constexpr,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    BIAS: gl.constexpr,
    KEEP_Z: gl.constexpr,
    KEEP_A: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
):
    """Start storing chunk INDEX of z and of a = act(z), CHUNK columns of each."""
    column = first + INDEX * CHUNK

    # Round z to the output dtype first, so that recomputing it gives the same activation.
    gate = take_chunk(total, INDEX, COLUMNS, CHUNK)
    if BIAS:
        gate = add_bias(gate, bias + expert * PARTS * width, column, width, CHUNK)
    gate, wide = round_and_widen(gate, a_out.dtype)
    act = function(wide, FUNCTION, True)
    if KEEP_Z:
        buffers.index(buffer).reshape([64, CHUNK]).store(gate)
    if PARTS == 2:
        SECOND: gl.constexpr = INDEX + COLUMNS // PARTS // CHUNK
        up = take_chunk(total, SECOND, COLUMNS, CHUNK)
        if BIAS:
            up = add_bias(up, bias + (expert * PARTS + 1) * width, column, width, CHUNK)
        up, wide = round_and_widen(up, a_out.dtype)
        act *= factor(wide, FUNCTION)
        if KEEP_Z:
            buffers.index(buffer + 1).reshape([64, CHUNK]).store(up)
    if KEEP_A:
        buffers.index(buffer + PARTS).reshape([64, CHUNK]).store(round_pairs(act, a_out.dtype))

    # TMA stores: the fence makes the buffers visible to the copy engine.
    fence_async_shared()
    if KEEP_Z:
        for part in gl.static_range(PARTS):
            store(z, ragged_at(row, end, part, column), buffers.index(buffer + part))
    if KEEP_A:
        store(a_out, ragged_at(row, end, 0, column), buffers.index(buffer + PARTS))


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
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `up_and_activate`: WARPGROUP selects which 64."""
    bias, z, a_out, a, b, full, empty, buffers, tiles, queue = tensors
    dim, ffn_dim = sizes
    WIDTH: gl.constexpr = COLUMNS // PARTS
    columns = gl.cdiv(ffn_dim, WIDTH)
    steps = gl.cdiv(dim, DEPTH)
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
                False,  # B_BY_DEPTH
                TOP_K > 0,  # GATHERED
                WARPGROUP,
                DEPTH,
                COLUMNS,
                STAGES,
            )

            # Epilogue: bias, activation and stores, CHUNK columns at a time.
            for i in gl.static_range(WIDTH // CHUNK):
                buffer = (BUFFERS * WARPGROUP + stored % BUFFERS) * (PARTS + 1)
                # Wait until the stores that used this buffer have read it.
                tma.store_wait((BUFFERS - 1) * (PARTS * KEEP_Z + KEEP_A))
                _activate_and_store(
                    total,
                    bias,
                    expert,
                    ffn_dim,
                    z,
                    a_out,
                    buffers,
                    buffer,
                    row,
                    end,
                    n * WIDTH,
                    i,
                    FUNCTION,
                    PARTS,
                    BIAS,
                    KEEP_Z,
                    KEEP_A,
                    COLUMNS,
                    CHUNK,
                )
                stored += 1
        else:  # the tile has no rows for this warp group
            skip_slices(full, empty, done, steps, STAGES)
        done += steps
        index = next_tile(queue, tile, 4, PROGRAMS)
        tile += 1
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def up_and_activate(
    x,  # [R, D] rows, or with TOP_K tokens [T, D]
    order,  # [R] slot of each row, or None without TOP_K
    weight,  # [E, PARTS * F, D]
    bias,  # [E, PARTS * F] or None
    z,  # [R, PARTS * F] or None
    a_out,  # [R, F]
    tiles,  # tile list, see ``_schedule``
    dim,  # D
    ffn_dim,  # F
    TOP_K: gl.constexpr,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    BIAS: gl.constexpr,
    KEEP_Z: gl.constexpr,
    KEEP_A: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write z = x @ up.T + bias [R, PARTS * F] and a = act(z) [R, F].

    With TOP_K, x holds tokens, and the loader gathers the row of slot s from token s // TOP_K. The
    other kernels gather their operands in the same way.
    """
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = left_slices(x, weight.dtype, TOP_K, DEPTH, STAGES)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    buffers = gl.allocate_shared_memory(
        weight.dtype, [2 * BUFFERS * (PARTS + 1)] + a_out.block_type.shape, a_out.layout
    )
    full = barriers(STAGES, arrivals(TOP_K))  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    queue = tile_queue(loading_warps(TOP_K))
    tensors = (bias, z, a_out, a, b, full, empty, buffers, tiles, queue)
    sizes = (dim, ffn_dim)
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
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
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
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                load_row_tiles,  # B_BY_DEPTH is False
                (operands, sizes, PARTS, False, TOP_K, DEPTH, COLUMNS, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )
