"""Matmuls in which one of the three matrices is block-sparse.

Legend: a block-sparse matrix has BLOCK x BLOCK blocks, stored row by row. Blocks from `live` on are
the tail: they are never read, and written as zero. Dense matrices may have any strides, and one
dimension of them may be split into groups with a stride of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenyard_kernels_triton.kernels._schedule import matrix_tile_at
from tokenyard_kernels_triton.kernels._tiles import dot, rounded


@triton.jit
def dense_times_dense(
    left,  # [M, K], rows in groups
    right,  # [K, N], columns in groups
    data,  # [blocks, BLOCK, BLOCK]
    row_indices,  # [blocks] block row
    column_indices,  # [blocks] block column
    live,  # [1] number of blocks before the tail
    schedule,  # [ceil(blocks / WIDE)] order in which runs of WIDE blocks are computed
    blocks,
    depth,  # K
    left_blocks,  # block rows of a group
    left_group,  # strides
    left_row,
    left_depth,
    right_blocks,  # block columns of a group
    right_group,  # strides
    right_depth,
    right_column,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write the blocks of left @ right, a tile of ROWS x COLUMNS a program.

    A tile wider than a block covers consecutive blocks. If they lie in several block rows, the
    program computes it once for each of these rows. EVEN says that DEPTH divides K.
    CONTIGUOUS says that the columns of `right` have stride 1, and 16 divides that of its groups.
    """
    # The tile: its first block, and its place in that block.
    SPAN: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK  # blocks that a tile covers
    ACROSS: tl.constexpr = (BLOCK + COLUMNS - 1) // COLUMNS  # tiles that a block has
    DOWN: tl.constexpr = BLOCK // ROWS
    unit = tl.program_id(0) // (ACROSS * DOWN)
    part = tl.program_id(0) % (ACROSS * DOWN)
    run = tl.load(schedule + unit // (WIDE // SPAN))
    first = run * WIDE + unit % (WIDE // SPAN) * SPAN
    inside_row = part // ACROSS * ROWS + tl.arange(0, ROWS)
    c = part % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    block = first + c // BLOCK  # [COLUMNS]
    inside_column = c % BLOCK
    kept = tl.load(live)
    targets = (
        data
        + (block.to(tl.int64) * BLOCK * BLOCK + inside_column)[None, :]
        + (inside_row * BLOCK)[:, None]
    )

    # Blocks of the tail.
    if first + SPAN > kept:
        zeros = tl.zeros([ROWS, COLUMNS], tl.float32).to(TYPE)
        tl.store(targets, zeros, mask=((block >= kept) & (block < blocks))[None, :])

    # The columns of `right`.
    exists = block < kept
    row_of = tl.load(row_indices + block, mask=exists, other=-1)
    index = tl.load(column_indices + block, mask=exists, other=0)
    column = (index // right_blocks).to(tl.int64) * right_group
    column += (index % right_blocks * BLOCK + inside_column).to(tl.int64) * right_column
    STEP: tl.constexpr = COLUMNS if COLUMNS < BLOCK else BLOCK
    if CONTIGUOUS:
        column = tl.max_contiguous(tl.multiple_of(column, 16), STEP)

    previous = -1
    for i in range(SPAN):
        row = tl.load(row_indices + first + i, mask=first + i < kept, other=-1)
        if row != previous and row >= 0:
            # Main loop.
            r = row % left_blocks * BLOCK + inside_row
            k = tl.arange(0, DEPTH)
            a = left + (row // left_blocks).to(tl.int64) * left_group
            a += r.to(tl.int64)[:, None] * left_row + k[None, :] * left_depth
            b = right + k[:, None] * right_depth + column[None, :]
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, depth, DEPTH):
                if EVEN:
                    x = tl.load(a)
                    y = tl.load(b)
                else:
                    x = tl.load(a, mask=(k < depth - start)[None, :], other=0.0)
                    y = tl.load(b, mask=(k < depth - start)[:, None], other=0.0)
                total = dot(x, y, total, PRECISION)
                a += DEPTH * left_depth
                b += DEPTH * right_depth

            # Epilogue: the blocks of this row.
            tl.store(targets, rounded(total, TYPE), mask=(row_of == row)[None, :])
        previous = row


@triton.jit
def sparse_times_dense(
    data,  # [blocks, BLOCK, BLOCK]
    dense,  # [K, N], rows in groups
    out,  # [M, N], rows in groups
    offsets,  # [M / BLOCK + 1] first block of each block row; of each block column if TRANSPOSED
    order,  # [blocks] blocks by column, read if TRANSPOSED
    indices,  # [blocks] block column of each block; if TRANSPOSED, block row in that order
    rows,  # M / BLOCK
    width,  # N
    dense_blocks,  # block rows of a group
    dense_group,  # strides
    dense_row,
    dense_column,
    out_blocks,  # block rows of a group
    out_group,  # strides
    out_row,
    out_column,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write sparse @ dense, or sparse.T @ dense if TRANSPOSED, a tile of ROWS x COLUMNS a program.

    EVEN says that COLUMNS divides N. A row without blocks is zero.
    """
    # The tile.
    DOWN: tl.constexpr = BLOCK // ROWS
    m, n = matrix_tile_at(rows * DOWN, tl.cdiv(width, COLUMNS), tl.program_id(0), GROUP)
    row = m // DOWN
    inside_row = m % DOWN * ROWS + tl.arange(0, ROWS)
    inside_column = tl.arange(0, COLUMNS)
    first = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)

    # Where a slice's elements lie, apart from the slice: the same in every slice.
    k = tl.arange(0, DEPTH)
    if TRANSPOSED:
        x_tile = inside_row[:, None] + (k * BLOCK)[None, :]
    else:
        x_tile = (inside_row * BLOCK)[:, None] + k[None, :]
    y_tile = k[:, None] * dense_row + inside_column[None, :] * dense_column
    b = dense + (n * COLUMNS).to(tl.int64) * dense_column
    c = n * COLUMNS + inside_column

    # Main loop: SLICES slices of each block. A block's place is loaded one slice ahead, so that
    # the pipeline loads matrices as early as it does with addresses that are computed.
    SLICES: tl.constexpr = BLOCK // DEPTH
    STEP: tl.constexpr = DEPTH * BLOCK if TRANSPOSED else DEPTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    block = tl.load(order + first, mask=first < end, other=0) if TRANSPOSED else first
    index = tl.load(indices + first, mask=first < end, other=0)
    for i in range(0, (end - first) * SLICES):
        part = i % SLICES
        x = tl.load(data + (block.to(tl.int64) * BLOCK * BLOCK + part * STEP) + x_tile)
        at = (index // dense_blocks).to(tl.int64) * dense_group
        at += (index % dense_blocks * BLOCK + part * DEPTH).to(tl.int64) * dense_row
        if EVEN:
            y = tl.load(b + at + y_tile)
        else:
            y = tl.load(b + at + y_tile, mask=(c < width)[None, :], other=0.0)
        total = dot(x, y, total, PRECISION)
        following = first + (i + 1) // SLICES
        if TRANSPOSED:
            block = tl.load(order + following, mask=following < end, other=0)
        else:
            block = following
        index = tl.load(indices + following, mask=following < end, other=0)

    # Epilogue.
    target = out + (row // out_blocks).to(tl.int64) * out_group
    target += (row % out_blocks * BLOCK + inside_row).to(tl.int64)[:, None] * out_row
    target += c.to(tl.int64)[None, :] * out_column
    tl.store(target, rounded(total, TYPE), mask=(c < width)[None, :])
