"""Products of batches of matrices that are known to be symmetric, for Hopper GPUs, in Gluon.

Only tiles that touch the lower triangle are computed. Each block of 64 x 64 below the diagonal is
stored twice, the second time transposed. ``_gluon_pipeline`` describes the pipeline.

Legend: B matrices, N rows and columns, K reduction dimension.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tokenyard_kernels_triton.kernels._gluon_pipeline import (
    accumulate,
    barriers,
    load,
    store,
    take_chunk,
)


@gluon.jit
def _tile_at(index, COLUMNS: gl.constexpr):
    """Return (row tile, column tile) of tile `index` of a matrix, row by row.

    Row tile m of 128 rows has the column tiles that begin left of column 128 * (m + 1).
    """
    m = 0
    width = 1  # column tiles of row tile m
    while index >= width:
        index -= width
        m += 1
        width = (128 * m) // COLUMNS + 1
    return m, index


@gluon.jit
def _load_tiles(
    operands,
    sizes,
    TRANSPOSED: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every tile: one box of `left` for each warp group, one of `right`."""
    left, right, a, b, full, empty = operands
    matrices, tiles, _, depth = sizes
    done = 0  # slices loaded by all tiles so far
    for index in range(gl.program_id(0), matrices * tiles, PROGRAMS):
        matrix = index // tiles
        m, n = _tile_at(index % tiles, COLUMNS)
        for k in range(0, depth, DEPTH):
            # Wait until both warp groups have consumed the stage's previous slice.
            stage = done % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, 2 * left.block_type.nbytes + right.block_type.nbytes)
            for half in gl.static_range(2):
                row = m * 128 + 64 * half
                if TRANSPOSED:
                    at = [matrix, 0, k, row]
                else:
                    at = [matrix, 0, row, k]
                load(left, at, ready, a.index(2 * stage + half))
            if TRANSPOSED:
                at = [matrix, 0, k, n * COLUMNS]
            else:
                at = [matrix, 0, n * COLUMNS, k]
            load(right, at, ready, b.index(stage))
            done += 1


@gluon.jit
def _add(
    block,  # [64, 64] float32
    addend,  # [N, N] of the block's matrix, or None
    row,
    column,
    size,  # N
    beta,
    diagonal,
):
    """Add beta * addend, and `diagonal` on the diagonal of the matrix."""
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, block.type.layout))[:, None]
    c = column + gl.arange(0, 64, layout=gl.SliceLayout(0, block.type.layout))[None, :]
    if addend is not None:
        inside = (r < size) & (c < size)
        block += beta * gl.load(addend + r * size + c, mask=inside, other=0.0).to(gl.float32)
    return block + gl.where(r == c, diagonal, 0.0)


@gluon.jit
def _multiply(
    tensors,
    sizes,
    factors,
    TRANSPOSED: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute 64 rows of each tile: WARPGROUP selects which 64."""
    addend, out, a, b, full, empty, buffers = tensors
    matrices, tiles, size, depth = sizes
    alpha, beta, diagonal = factors
    steps = gl.cdiv(depth, DEPTH)
    done = 0  # slices consumed by all tiles so far
    for index in range(gl.program_id(0), matrices * tiles, PROGRAMS):
        matrix = index // tiles
        m, n = _tile_at(index % tiles, COLUMNS)
        row = m * 128 + 64 * WARPGROUP
        # Main loop.
        total = accumulate(
            a,
            b,
            full,
            empty,
            done,
            steps,
            TRANSPOSED,  # A_BY_DEPTH
            TRANSPOSED,  # B_BY_DEPTH
            False,  # GATHERED
            WARPGROUP,
            DEPTH,
            COLUMNS,
            STAGES,
        )

        # Epilogue: blocks of 64 columns up to the diagonal, and their mirror images.
        plane = addend
        if addend is not None:
            plane = addend + matrix * size * size
        for i in gl.static_range(COLUMNS // 64):
            column = n * COLUMNS + 64 * i
            if column <= row:
                block = take_chunk(total, i, COLUMNS, 64) * alpha
                block = _add(block, plane, row, column, size, beta, diagonal).to(a.dtype)
                tma.store_wait(0)  # until the last stores have read the buffers
                buffer = buffers.index(2 * WARPGROUP)
                mirror = buffers.index(2 * WARPGROUP + 1)
                buffer.reshape([64, 64]).store(block)
                mirror.reshape([64, 64]).permute([1, 0]).store(block)
                fence_async_shared()
                store(out, [matrix, 0, row, column], buffer)
                # A block on the diagonal is stored once: outside of the matrix nothing is written.
                store(out, [matrix, 0, column + (column == row) * 0x40000000, row], mirror)
        done += steps
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit(do_not_specialize=["matrices", "tiles", "depth"])
def symmetric_product(
    left,  # [B, N, K], or [B, K, N] if TRANSPOSED
    right,  # like left
    addend,  # [B, N, N] or None
    out,  # [B, N, N]
    matrices,  # B
    size,  # N
    depth,  # K
    tiles,  # of one matrix
    alpha,
    beta,
    diagonal,
    TRANSPOSED: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Write out = alpha * left @ right.T + beta * addend + diagonal * I.

    The product and the addend must be symmetric. If TRANSPOSED, the product is left.T @ right.
    There are less than 2^31 numbers in out.
    """
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = gl.allocate_shared_memory(left.dtype, [2 * STAGES] + left.block_type.shape, left.layout)
    b = gl.allocate_shared_memory(right.dtype, [STAGES] + right.block_type.shape, right.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [4] + out.block_type.shape, out.layout)
    full = barriers(STAGES, 1)  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    tensors = (addend, out, a, b, full, empty, buffers)
    sizes = (matrices, tiles, size, depth)
    factors = (alpha, beta, diagonal)
    operands = (left, right, a, b, full, empty)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    tensors,
                    sizes,
                    factors,
                    TRANSPOSED,
                    0,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    PROGRAMS,
                    STAGES,
                ),
            ),
            (
                _multiply,
                (
                    tensors,
                    sizes,
                    factors,
                    TRANSPOSED,
                    1,  # WARPGROUP
                    DEPTH,
                    COLUMNS,
                    PROGRAMS,
                    STAGES,
                ),
            ),
            (
                _load_tiles,
                (operands, sizes, TRANSPOSED, DEPTH, COLUMNS, PROGRAMS, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )
