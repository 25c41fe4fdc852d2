"""Weight gradients in FP8 for Hopper GPUs, in Gluon.

The reduction runs over an expert's rows, so both operands are transposed first: numbers of one
column of all rows lie side by side, in blocks of 128 rows that belong to one expert
(``_transpose``). The left operand has a scale for each 128 numbers of a row, and the right one for
each 128 x 128, as in ``_gluon_fp8_up``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from tokenyard_kernels_triton.kernels._gluon_fp8_tiles import HALF, accumulate
from tokenyard_kernels_triton.kernels._gluon_loads import load_slice
from tokenyard_kernels_triton.kernels._gluon_pipeline import barriers, store, take_chunk
from tokenyard_kernels_triton.kernels._gluon_queue import (
    claim_tile,
    next_tile,
    publish_tile,
    slices_before_claim,
    tile_queue,
)
from tokenyard_kernels_triton.kernels._schedule import first_block, matrix_tile_at


@gluon.jit
def _multiply_columns(
    tensors,
    sizes,
    WARPGROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `weight_gradient_fp8`: WARPGROUP selects which 64."""
    scales, out, a, b, full, empty, buffers, offsets, by_rows, queue = tensors
    left_scales, right_scales = scales
    num_experts, rows, columns, blocks = sizes
    m_tiles = rows // 128
    n_tiles = gl.cdiv(columns, 256)
    per_expert = m_tiles * n_tiles
    lane = gl.arange(0, 64, gl.SliceLayout(1, HALF))
    done = 0  # slices consumed by all tiles so far
    tile = 0  # tiles computed so far
    index = gl.program_id(0)
    while index < num_experts * per_expert:
        expert = gl.load(by_rows + index // per_expert)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % per_expert, GROUP)
        row = m * 128 + WARPGROUP * 64
        start = gl.load(offsets + expert)
        steps = gl.cdiv(gl.load(offsets + expert + 1) - start, 128)
        block = first_block(start, expert)

        # Main loop over the expert's rows; the sum is zero if it has none.
        first, second = accumulate(
            a,
            b,
            full,
            empty,
            done,
            steps,
            left_scales,
            (row + lane) * blocks + block,
            right_scales,
            2 * n * blocks + block,
            gl.where(n * 256 + 128 < columns, blocks, 0),
            1,
            WARPGROUP,
            STAGES,
        )

        # Epilogue: store CHUNK columns at a time.
        for i in gl.static_range(256 // CHUNK):
            # Wait until the store that used this buffer has read it.
            tma.store_wait(BUFFERS - 1)
            buffer = buffers.index(BUFFERS * WARPGROUP + i % BUFFERS)
            half = first if i < 128 // CHUNK else second
            chunk = take_chunk(half, i % (128 // CHUNK), 128, CHUNK)
            buffer.reshape([64, CHUNK]).store(chunk.to(out.dtype))
            fence_async_shared()
            store(out, [expert, 0, row, n * 256 + i * CHUNK], buffer)
        done += steps
        index = next_tile(queue, tile, 4, PROGRAMS)
        tile += 1
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def _load_columns(
    operands, sizes, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr
):
    """Load the slices of every tile of a weight gradient."""
    left, right, a, b, full, empty, offsets, by_rows, counter, queue = operands
    num_experts, rows, columns, _ = sizes
    m_tiles = rows // 128
    n_tiles = gl.cdiv(columns, 256)
    per_expert = m_tiles * n_tiles
    total = num_experts * per_expert
    shared = (a, b, full, empty)
    done = 0  # slices loaded by all tiles so far
    tile = 0  # tiles loaded so far
    index = gl.program_id(0)
    while index < total:
        expert = gl.load(by_rows + index // per_expert)
        at = matrix_tile_at(m_tiles, n_tiles, index % per_expert, GROUP)
        start = gl.load(offsets + expert)
        steps = gl.cdiv(gl.load(offsets + expert + 1) - start, 128)
        claim_at = slices_before_claim(steps)
        column = first_block(start, expert) * 128
        for k in range(0, claim_at):
            done = _load_slice(left, right, at, column + 128 * k, shared, done, STAGES)
        claimed = claim_tile(counter, 1)
        for k in range(claim_at, steps):
            done = _load_slice(left, right, at, column + 128 * k, shared, done, STAGES)
        index = publish_tile(queue, counter, claimed, tile, total, 1, PROGRAMS)
        tile += 1


@gluon.jit
def _load_slice(
    left,
    right,
    at,  # the tile's row and column
    column,  # of both operands
    shared,
    done,  # slices loaded before
    STAGES: gl.constexpr,
):
    """Load a slice of a weight gradient, and return the next slice's number."""
    m, n = at
    a, b, full, empty = shared
    boxes = ([0, 0, m * 128, column], [0, 0, m * 128 + 64, column])
    box = [0, 0, n * 256, column]
    return load_slice(left, right, boxes, (box,), a, b, full, empty, done, STAGES)


@gluon.jit
def weight_gradient_fp8(
    left,  # [rows, columns of padded rows] in e4m3
    left_scales,  # [rows, blocks]
    right,  # [columns, columns of padded rows] in e4m3
    right_scales,  # [columns / 128, blocks]
    out,  # [E, rows, columns] in 16 bits
    offsets,  # [E + 1]
    by_rows,  # [E] experts, those with most rows first
    counter,  # of a tile list, see ``_gluon_queue``
    num_experts,  # E
    rows,
    columns,
    blocks,  # of 128 padded rows
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write out[e] = left[:, rows of e] @ right[:, rows of e].T for each expert e."""
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = gl.allocate_shared_memory(left.dtype, [2 * STAGES] + left.block_type.shape, left.layout)
    b = gl.allocate_shared_memory(right.dtype, [STAGES] + right.block_type.shape, right.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full = barriers(STAGES, 1)  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    queue = tile_queue(1)
    sizes = (num_experts, rows, columns, blocks)
    scales = (left_scales, right_scales)
    tensors = (scales, out, a, b, full, empty, buffers, offsets, by_rows, queue)
    operands = (left, right, a, b, full, empty, offsets, by_rows, counter, queue)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply_columns,
                (tensors, sizes, 0, CHUNK, GROUP, PROGRAMS, STAGES, BUFFERS),
            ),
            (
                _multiply_columns,
                (tensors, sizes, 1, CHUNK, GROUP, PROGRAMS, STAGES, BUFFERS),
            ),
            (_load_columns, (operands, sizes, GROUP, PROGRAMS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
