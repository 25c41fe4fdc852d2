"""Weight gradients in FP8 for Hopper GPUs, in Gluon.

The reduction runs over an expert's rows, so both operands are transposed first: numbers of one
column of all rows lie side by side, in blocks of 128 rows that belong to one expert
(``_transpose``). The left operand has a scale for each 128 numbers of a row, and the right one for
each 128 x 128, as in ``_gluon_fp8``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tokenyard_kernels_triton.kernels._gluon_fp8_tiles import HALF, accumulate
from tokenyard_kernels_triton.kernels._gluon_pipeline import barriers, load, store, take_chunk
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
    left_scales, right_scales, out, a, b, full, empty, buffers, offsets, by_rows = tensors
    num_experts, rows, columns, blocks = sizes
    m_tiles = rows // 128
    n_tiles = gl.cdiv(columns, 256)
    per_expert = m_tiles * n_tiles
    lane = gl.arange(0, 64, gl.SliceLayout(1, HALF))
    done = 0  # slices consumed by all tiles so far
    for index in range(gl.program_id(0), num_experts * per_expert, PROGRAMS):
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
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def _load_columns(
    operands, sizes, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr
):
    """Load the slices of every tile of a weight gradient."""
    left, right, a, b, full, empty, offsets, by_rows = operands
    num_experts, rows, columns, _ = sizes
    m_tiles = rows // 128
    n_tiles = gl.cdiv(columns, 256)
    per_expert = m_tiles * n_tiles
    done = 0  # slices loaded by all tiles so far
    for index in range(gl.program_id(0), num_experts * per_expert, PROGRAMS):
        expert = gl.load(by_rows + index // per_expert)
        m, n = matrix_tile_at(m_tiles, n_tiles, index % per_expert, GROUP)
        start = gl.load(offsets + expert)
        steps = gl.cdiv(gl.load(offsets + expert + 1) - start, 128)
        column = first_block(start, expert) * 128
        for _ in range(0, steps):
            # Wait until both warp groups have consumed the stage's previous slice.
            stage = done % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, 2 * left.block_type.nbytes + right.block_type.nbytes)
            for half in gl.static_range(2):
                at = [0, 0, m * 128 + 64 * half, column]
                load(left, at, ready, a.index(2 * stage + half))
            load(right, [0, 0, n * 256, column], ready, b.index(stage))
            column += 128
            done += 1


@gluon.jit
def weight_gradient_fp8(
    left,  # [rows, columns of padded rows] in e4m3
    left_scales,  # [rows, blocks]
    right,  # [columns, columns of padded rows] in e4m3
    right_scales,  # [columns / 128, blocks]
    out,  # [E, rows, columns] in 16 bits
    offsets,  # [E + 1]
    by_rows,  # [E] experts, those with most rows first
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
    sizes = (num_experts, rows, columns, blocks)
    tensors = (left_scales, right_scales, out, a, b, full, empty, buffers, offsets, by_rows)
    operands = (left, right, a, b, full, empty, offsets, by_rows)

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
