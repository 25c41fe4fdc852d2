"""The block-sparse matmuls for Hopper GPUs, in Gluon, for 16-bit blocks of 128 x 128.

They share the pipeline of ``_gluon_pipeline``: a tile has 128 rows, so a slice of a block-sparse
operand is half a block, and 256 columns. Each kernel has a ``_multiply_*`` function, which the two
warp groups run, and a ``_load_*`` function, which the loader runs.

Dense operands are descriptors of three dimensions: groups, and a matrix in each.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from tokenyard_kernels_triton.kernels._gluon_loads import left_slices, load_slice
from tokenyard_kernels_triton.kernels._gluon_pipeline import (
    accumulate,
    barriers,
    round_pairs,
    store,
    take_chunk,
)
from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at

BLOCK = gl.constexpr(128)
COLUMNS = gl.constexpr(256)  # of a tile
DEPTH = gl.constexpr(64)  # of a slice
SLICES = gl.constexpr(2)  # of a block


@gluon.jit
def _multiply_sparse(
    tensors,
    sizes,
    A_BY_DEPTH: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    OUT_BY_COLUMNS: gl.constexpr,
    WARPGROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `sparse_times_dense`: WARPGROUP selects which 64."""
    out, a, b, full, empty, buffers, offsets, _, _ = tensors
    rows, width, _, out_blocks = sizes
    columns = gl.cdiv(width, COLUMNS)
    done = 0  # slices consumed by all tiles so far
    stored = 0  # chunks stored by all tiles so far
    for index in range(gl.program_id(0), rows * columns, PROGRAMS):
        m, n = matrix_tile_at(rows, columns, index, GROUP)
        steps = (gl.load(offsets + m + 1) - gl.load(offsets + m)) * SLICES

        # Main loop over the row's blocks; the sum is zero if it has none.
        total = accumulate(
            a,
            b,
            full,
            empty,
            done,
            steps,
            A_BY_DEPTH,
            B_BY_DEPTH,
            False,  # GATHERED
            WARPGROUP,
            DEPTH,
            COLUMNS,
            STAGES,
        )

        # Epilogue: store CHUNK columns at a time.
        row = m % out_blocks * BLOCK + 64 * WARPGROUP
        for i in gl.static_range(COLUMNS // CHUNK):
            # Wait until the store that used this buffer has read it.
            tma.store_wait(BUFFERS - 1)
            buffer = buffers.index(BUFFERS * WARPGROUP + stored % BUFFERS)
            chunk = round_pairs(take_chunk(total, i, COLUMNS, CHUNK), a.dtype)
            column = n * COLUMNS + i * CHUNK
            if OUT_BY_COLUMNS:
                buffer.reshape([CHUNK, 64]).permute([1, 0]).store(chunk)
                at = [m // out_blocks, column, row]
            else:
                buffer.reshape([64, CHUNK]).store(chunk)
                at = [m // out_blocks, row, column]
            fence_async_shared()
            store(out, at, buffer)
            stored += 1
        done += steps
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def _load_sparse(
    operands,
    sizes,
    A_BY_DEPTH: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every tile of `sparse_times_dense`."""
    data, dense, a, b, full, empty, offsets, order, indices = operands
    rows, width, dense_blocks, _ = sizes
    columns = gl.cdiv(width, COLUMNS)
    done = 0  # slices loaded by all tiles so far
    for index in range(gl.program_id(0), rows * columns, PROGRAMS):
        m, n = matrix_tile_at(rows, columns, index, GROUP)
        first = gl.load(offsets + m)
        end = gl.load(offsets + m + 1)
        block = first
        if A_BY_DEPTH:
            block = gl.load(order + first, mask=first < end, other=0)
        inner = gl.load(indices + first, mask=first < end, other=0)
        for i in range(first, end):
            # Prefetch the next block's place while this block waits for its stages.
            next_block = i + 1
            if A_BY_DEPTH:
                next_block = gl.load(order + i + 1, mask=i + 1 < end, other=0)
            next_inner = gl.load(indices + i + 1, mask=i + 1 < end, other=0)
            for part in gl.static_range(SLICES):
                depth = inner % dense_blocks * BLOCK + part * DEPTH
                if A_BY_DEPTH:
                    halves = ([block, part * DEPTH, 0], [block, part * DEPTH, 64])
                else:
                    halves = ([block, 0, part * DEPTH], [block, 64, part * DEPTH])
                if B_BY_DEPTH:
                    at = [inner // dense_blocks, depth, n * COLUMNS]
                else:
                    at = [inner // dense_blocks, n * COLUMNS, depth]
                done = load_slice(data, dense, halves, (at,), a, b, full, empty, done, STAGES)
            block = next_block
            inner = next_inner


@gluon.jit(do_not_specialize=["rows", "width", "dense_blocks", "out_blocks"])
def sparse_times_dense(
    data,  # [blocks, BLOCK, BLOCK]
    dense,  # [groups, K / groups, N] if B_BY_DEPTH, else [groups, N, K / groups]
    out,  # [groups, M / groups, N], or [groups, N, M / groups] if OUT_BY_COLUMNS
    offsets,  # [M / BLOCK + 1] first block of each block row; of each block column if A_BY_DEPTH
    order,  # [blocks] blocks by column, read if A_BY_DEPTH
    indices,  # [blocks] block column of each block; if A_BY_DEPTH, block row in that order
    rows,  # M / BLOCK
    width,  # N
    dense_blocks,  # block rows of a group
    out_blocks,  # block rows of a group
    A_BY_DEPTH: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    OUT_BY_COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write sparse @ dense, or sparse.T @ dense if A_BY_DEPTH. A row without blocks is zero."""
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = left_slices(data, out.dtype, 0, DEPTH, STAGES)
    b = gl.allocate_shared_memory(out.dtype, [STAGES] + dense.block_type.shape, dense.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS] + out.block_type.shape, out.layout)
    full = barriers(STAGES, 1)  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    tensors = (out, a, b, full, empty, buffers, offsets, order, indices)
    operands = (data, dense, a, b, full, empty, offsets, order, indices)
    sizes = (rows, width, dense_blocks, out_blocks)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply_sparse,
                (
                    tensors,
                    sizes,
                    A_BY_DEPTH,
                    B_BY_DEPTH,
                    OUT_BY_COLUMNS,
                    0,  # WARPGROUP
                    CHUNK,
                    GROUP,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _multiply_sparse,
                (
                    tensors,
                    sizes,
                    A_BY_DEPTH,
                    B_BY_DEPTH,
                    OUT_BY_COLUMNS,
                    1,  # WARPGROUP
                    CHUNK,
                    GROUP,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _load_sparse,
                (operands, sizes, A_BY_DEPTH, B_BY_DEPTH, GROUP, PROGRAMS, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _pairs(boxes, STAGES: gl.constexpr, BY_DEPTH: gl.constexpr):
    """View boxes [2 * STAGES, 1, ...] of 128 columns as slices of 256 columns.

    A slice by depth lies in memory 64 columns after 64 columns, as its boxes do.
    """
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    if BY_DEPTH:
        return boxes._reinterpret(boxes.dtype, [STAGES, DEPTH, COLUMNS], LAYOUT)
    else:
        return boxes._reinterpret(boxes.dtype, [STAGES, COLUMNS, DEPTH], LAYOUT)


@gluon.jit
def _rows_of_run(row_indices, first, blocks):
    """Return the block rows of a run's two blocks: the same if there is only one block."""
    one = gl.load(row_indices + first)
    return one, gl.load(row_indices + first + 1, mask=first + 1 < blocks, other=one)


@gluon.jit
def _multiply_dense(
    tensors,
    sizes,
    A_BY_DEPTH: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    WARPGROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Compute 64 rows of each tile of `dense_times_dense`: WARPGROUP selects which 64."""
    data, a, b, full, empty, buffers, row_indices, _, schedule = tensors
    blocks, rows, depth, _, _ = sizes
    done = 0  # slices consumed by all tiles so far
    stored = 0  # chunks stored by all tiles so far
    for unit in range(gl.program_id(0), gl.cdiv(blocks, 2), PROGRAMS):
        first = gl.load(schedule + unit) * 2
        one, two = _rows_of_run(row_indices, first, blocks)
        for turn in range(0, gl.where(one == two, 1, 2)):
            # Main loop; the sum is zero in the tail.
            row = gl.where(turn == 0, one, two)
            steps = gl.where(row < rows, gl.cdiv(depth, DEPTH), 0)
            total = accumulate(
                a,
                b,
                full,
                empty,
                done,
                steps,
                A_BY_DEPTH,
                B_BY_DEPTH,
                False,  # GATHERED
                WARPGROUP,
                DEPTH,
                COLUMNS,
                STAGES,
            )

            # Epilogue: store CHUNK columns at a time, of the blocks of this row.
            for second in gl.static_range(2):
                row_of = two if second else one
                if (row_of == row) & (first + second < blocks):
                    for i in gl.static_range(BLOCK // CHUNK):
                        # Wait until the store that used this buffer has read it.
                        tma.store_wait(BUFFERS - 1)
                        buffer = buffers.index(BUFFERS * WARPGROUP + stored % BUFFERS)
                        chunk = take_chunk(total, second * BLOCK // CHUNK + i, COLUMNS, CHUNK)
                        buffer.reshape([64, CHUNK]).store(round_pairs(chunk, a.dtype))
                        fence_async_shared()
                        store(data, [first + second, 64 * WARPGROUP, i * CHUNK], buffer)
                        stored += 1
            done += steps
    tma.store_wait(0)  # before the program ends and its buffers are freed


@gluon.jit
def _load_dense(
    operands,
    sizes,
    A_BY_DEPTH: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the slices of every tile of `dense_times_dense`."""
    left, right, a, b, full, empty, row_indices, column_indices, schedule = operands
    blocks, rows, depth, left_blocks, right_blocks = sizes
    done = 0  # slices loaded by all tiles so far
    for unit in range(gl.program_id(0), gl.cdiv(blocks, 2), PROGRAMS):
        first = gl.load(schedule + unit) * 2
        one, two = _rows_of_run(row_indices, first, blocks)
        column = gl.load(column_indices + first)
        next_column = gl.load(column_indices + first + 1, mask=first + 1 < blocks, other=0)
        for turn in range(0, gl.where(one == two, 1, 2)):
            row = gl.where(turn == 0, one, two)
            group = row // left_blocks
            r = row % left_blocks * BLOCK
            for k in range(0, gl.where(row < rows, depth, 0), DEPTH):
                if A_BY_DEPTH:
                    halves = ([group, k, r], [group, k, r + 64])
                else:
                    halves = ([group, r, k], [group, r + 64, k])
                c = column % right_blocks * BLOCK
                next_c = next_column % right_blocks * BLOCK
                if B_BY_DEPTH:
                    at = [column // right_blocks, k, c]
                    next_at = [next_column // right_blocks, k, next_c]
                else:
                    at = [column // right_blocks, c, k]
                    next_at = [next_column // right_blocks, next_c, k]
                done = load_slice(
                    left,
                    right,
                    halves,
                    (at, next_at),
                    a,
                    b,
                    full,
                    empty,
                    done,
                    STAGES,
                )


@gluon.jit(do_not_specialize=["blocks", "rows", "depth", "left_blocks", "right_blocks"])
def dense_times_dense(
    left,  # [groups, M / groups, K], or [groups, K, M / groups] if A_BY_DEPTH
    right,  # [groups, K, N / groups] if B_BY_DEPTH, else [groups, N / groups, K]
    data,  # [blocks, BLOCK, BLOCK]
    row_indices,  # [blocks] block row; M / BLOCK in the tail
    column_indices,  # [blocks] block column
    schedule,  # [ceil(blocks / 2)] order in which runs of two blocks are computed
    blocks,
    rows,  # M / BLOCK
    depth,  # K
    left_blocks,  # block rows of a group
    right_blocks,  # block columns of a group
    A_BY_DEPTH: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    CHUNK: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Write the blocks of left @ right, and zero to those of the tail.

    A tile is a run of two consecutive blocks. If they lie in two block rows, it is computed once
    for each of them.
    """
    # Prologue: slices of both operands, output buffers, and barriers in shared memory.
    a = left_slices(left, data.dtype, 0, DEPTH, STAGES)
    boxes = gl.allocate_shared_memory(
        data.dtype, [2 * STAGES] + right.block_type.shape, right.layout
    )
    b = _pairs(boxes, STAGES, B_BY_DEPTH)
    buffers = gl.allocate_shared_memory(
        data.dtype, [2 * BUFFERS] + data.block_type.shape, data.layout
    )
    full = barriers(STAGES, 1)  # completed by the loader
    empty = barriers(STAGES, 2)  # completed by both warp groups
    tensors = (data, a, b, full, empty, buffers, row_indices, column_indices, schedule)
    operands = (left, right, a, boxes, full, empty, row_indices, column_indices, schedule)
    sizes = (blocks, rows, depth, left_blocks, right_blocks)

    # Partitions: warp group 0, warp group 1, loader.
    gl.warp_specialize(
        [
            (
                _multiply_dense,
                (
                    tensors,
                    sizes,
                    A_BY_DEPTH,
                    B_BY_DEPTH,
                    0,  # WARPGROUP
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _multiply_dense,
                (
                    tensors,
                    sizes,
                    A_BY_DEPTH,
                    B_BY_DEPTH,
                    1,  # WARPGROUP
                    CHUNK,
                    PROGRAMS,
                    STAGES,
                    BUFFERS,
                ),
            ),
            (
                _load_dense,
                (operands, sizes, A_BY_DEPTH, B_BY_DEPTH, PROGRAMS, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )
