"""The gradient through the down projection and the activation, for Hopper GPUs, in Gluon.

The matmul is that of ``_gluon_rows``'s `times_weight`. Its epilogue reads the pre-activation, so
the gradient of the activation is never stored. Each warp group loads its own rows of the
pre-activation by TMA, RING chunks ahead: the first ones before a tile's main loop.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tokenyard_kernels_triton.kernels._activations import (
    factor,
    function_and_slope,
    through_clamp,
)
from tokenyard_kernels_triton.kernels._gluon_loads import (
    arrivals,
    left_slices,
    load_row_tiles,
    loading_warps,
    registers,
)
from tokenyard_kernels_triton.kernels._gluon_pipeline import (
    accumulate,
    barriers,
    load,
    ragged_at,
    round_pairs,
    skip_slices,
    store,
    take_chunk,
)
from tokenyard_kernels_triton.kernels._gluon_queue import next_tile, tile_queue
from tokenyard_kernels_triton.kernels._schedule import tile_at


@gluon.constexpr_function
def _layout(CHUNK):
    """Return the layout of a chunk [64, CHUNK] in registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])


@gluon.jit
def _load_chunk(
    z,  # [R, PARTS * F]
    chunks,  # [2 * RING * PARTS, ...] in shared memory
    ready,  # barriers [2 * RING]
    number,  # of the chunk, counted over all tiles
    row,
    end,
    column,
    PARTS: gl.constexpr,
    WARPGROUP: gl.constexpr,
    RING: gl.constexpr,
):
    """Start loading a chunk of the pre-activation: 64 rows, CHUNK columns of each part."""
    slot = RING * WARPGROUP + number % RING
    mbarrier.expect(ready.index(slot), PARTS * z.block_type.nbytes)
    for part in gl.static_range(PARTS):
        target = chunks.index(slot * PARTS + part)
        load(z, ragged_at(row, end, part, column), ready.index(slot), target)


@gluon.jit
def _row_weights(topk_weights, order, row, end, WEIGHTED: gl.constexpr, CHUNK: gl.constexpr):
    """Return the weights of the rows [64] before `end`."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, _layout(CHUNK))
    rows = row + gl.arange(0, 64, LAYOUT)
    if WEIGHTED:
        slots = gl.load(order + rows, mask=rows < end, other=0)
        return gl.load(topk_weights + slots, mask=rows < end, other=0.0).to(gl.float32)
    else:
        return gl.full([64], 1.0, gl.float32, LAYOUT)


@gluon.jit
def _differentiate_chunk(
    gradient,  # [64, CHUNK] of the activation, not weighted
    w,  # [64]
    chunks,
    buffers,
    slot,
    buffer,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    CHUNK: gl.constexpr,
):
    """Write a chunk of dz and of the weighted activation to buffers; return its row dots [64]."""
    LAYOUT: gl.constexpr = _layout(CHUNK)
    gate = chunks.index(slot * PARTS).reshape([64, CHUNK]).load(LAYOUT).to(gl.float32)
    a, slope = function_and_slope(gate, FUNCTION, True)
    weighted = gradient * w[:, None]
    slope *= weighted
    if PARTS == 2:
        up = chunks.index(slot * PARTS + 1).reshape([64, CHUNK]).load(LAYOUT).to(gl.float32)
        dup = through_clamp(weighted * a, up, FUNCTION)
        target = buffers.index(buffer + 1)
        target.reshape([64, CHUNK]).store(round_pairs(dup, target.dtype))
        a *= factor(up, FUNCTION)
        slope *= factor(up, FUNCTION)
    target = buffers.index(buffer)
    target.reshape([64, CHUNK]).store(round_pairs(slope, target.dtype))
    target = buffers.index(buffer + PARTS)
    target.reshape([64, CHUNK]).store(round_pairs(a * w[:, None], target.dtype))
    return gl.sum(gradient * a, 1)


@gluon.jit
def _differentiate_rows(
    tensors,
    sizes,
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    WEIGHTED: gl.constexpr,
    TOP_K: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    RING: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `differentiate_down`: WARPGROUP selects which 64."""
    matrices, vectors, shared, barriers_of, tiles, queue = tensors
    z, dz, weighted = matrices
    dots, order, topk_weights = vectors
    a, b, chunks, buffers = shared
    full, empty, ready = barriers_of
    depth, width = sizes
    columns = gl.cdiv(width, COLUMNS)
    steps = gl.cdiv(depth, DEPTH)
    CHUNKS: gl.constexpr = COLUMNS // CHUNK
    done = 0  # slices consumed by all tiles so far
    first_chunk = 0  # chunks stored by all tiles so far
    total_tiles = gl.load(tiles) * columns
    tile = 0  # tiles computed so far
    index = gl.program_id(0)
    while index < total_tiles:
        _, first, end, n = tile_at(tiles, columns, index, 128)
        row = first + 64 * WARPGROUP
        if row < end:
            # Prefetch: the first chunks of the pre-activation, and the weights of the rows.
            for i in gl.static_range(RING):
                _load_chunk(
                    z,
                    chunks,
                    ready,
                    first_chunk + i,
                    row,
                    end,
                    n * COLUMNS + i * CHUNK,
                    PARTS,
                    WARPGROUP,
                    RING,
                )
            w = _row_weights(topk_weights, order, row, end, WEIGHTED, CHUNK)

            # Main loop.
            total = accumulate(
                a,
                b,
                full,
                empty,
                done,
                steps,
                False,  # A_BY_DEPTH
                True,  # B_BY_DEPTH
                TOP_K > 0,  # GATHERED
                WARPGROUP,
                DEPTH,
                COLUMNS,
                STAGES,
            )

            # Epilogue, CHUNK columns at a time.
            dot = gl.zeros([64], gl.float32, gl.SliceLayout(1, _layout(CHUNK)))
            for i in gl.static_range(CHUNKS):
                number = first_chunk + i
                slot = RING * WARPGROUP + number % RING
                buffer = (BUFFERS * WARPGROUP + number % BUFFERS) * (PARTS + 1)
                mbarrier.wait(ready.index(slot), (number // RING) & 1)
                # Wait until the stores that used these buffers have read them.
                tma.store_wait((BUFFERS - 1) * (PARTS + 1))
                dot += _differentiate_chunk(
                    take_chunk(total, i, COLUMNS, CHUNK),
                    w,
                    chunks,
                    buffers,
                    slot,
                    buffer,
                    FUNCTION,
                    PARTS,
                    CHUNK,
                )
                column = n * COLUMNS + i * CHUNK
                fence_async_shared()
                for part in gl.static_range(PARTS):
                    store(dz, ragged_at(row, end, part, column), buffers.index(buffer + part))
                store(weighted, ragged_at(row, end, 0, column), buffers.index(buffer + PARTS))
                if i + RING < CHUNKS:
                    _load_chunk(
                        z,
                        chunks,
                        ready,
                        number + RING,
                        row,
                        end,
                        column + RING * CHUNK,
                        PARTS,
                        WARPGROUP,
                        RING,
                    )
            first_chunk += CHUNKS
            rows = row + gl.arange(0, 64, gl.SliceLayout(1, _layout(CHUNK)))
            gl.store(dots + rows.to(gl.int64) * columns + n, dot, mask=rows < end)
        else:  # the tile has no rows for this warp group
            skip_slices(full, empty, done, steps, STAGES)
        done += steps
        index = next_tile(queue, tile, 4, PROGRAMS)
        tile += 1
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def differentiate_down(
    left,  # [R, D] rows of dy, or with TOP_K tokens [T, D]
    order,  # [R] slot of each row
    topk_weights,  # [N], read if WEIGHTED
    weight,  # [E, D, F]
    z,  # [R, PARTS * F]
    dz,  # [R, PARTS * F]
    weighted,  # [R, F]
    dots,  # [R, ceil(F / COLUMNS)]
    tiles,  # tile list, see ``_schedule``
    depth,  # D
    width,  # F
    FUNCTION: gl.constexpr,
    PARTS: gl.constexpr,
    WEIGHTED: gl.constexpr,
    TOP_K: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    RING: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write dz, the weighted activation w * a, and row dots <da, a>, for da = dy @ down.

    The dots of a row have one number for each COLUMNS columns.
    """
    # Prologue: slices, chunks, output buffers, and barriers in shared memory.
    dtype: gl.constexpr = weight.dtype
    a = left_slices(left, dtype, TOP_K, DEPTH, STAGES)
    b = gl.allocate_shared_memory(dtype, [STAGES] + weight.block_type.shape, weight.layout)
    chunks = gl.allocate_shared_memory(dtype, [2 * RING * PARTS] + z.block_type.shape, z.layout)
    buffers = gl.allocate_shared_memory(
        dtype, [2 * BUFFERS * (PARTS + 1)] + z.block_type.shape, z.layout
    )
    full = barriers(STAGES, arrivals(TOP_K))  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    ready = barriers(2 * RING, 1)  # completed by each warp group's loads
    queue = tile_queue(loading_warps(TOP_K))
    tensors = (
        (z, dz, weighted),
        (dots, order, topk_weights),
        (a, b, chunks, buffers),
        (full, empty, ready),
        tiles,
        queue,
    )
    sizes = (depth, width)
    operands = (left, order, weight, a, b, full, empty, tiles, queue)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _differentiate_rows,
                (
                    tensors,
                    sizes,
                    FUNCTION,
                    PARTS,
                    WEIGHTED,
                    TOP_K,
                    0,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    RING,
                    BUFFERS,
                ),
            ),
            (
                _differentiate_rows,
                (
                    tensors,
                    sizes,
                    FUNCTION,
                    PARTS,
                    WEIGHTED,
                    TOP_K,
                    1,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    RING,
                    BUFFERS,
                ),
            ),
            (
                load_row_tiles,  # PARTS is 1, B_BY_DEPTH is True
                (operands, sizes, 1, True, TOP_K, DEPTH, COLUMNS, PROGRAMS, STAGES),
            ),
        ],
        [4, loading_warps(TOP_K)],
        registers(TOP_K),
    )
