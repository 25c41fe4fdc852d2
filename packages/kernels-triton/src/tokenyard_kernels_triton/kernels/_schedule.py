"""Which tile a program computes next, from the plan's offsets, on the device.

A *tile list* holds, in int32: how many tiles there are, then (expert, first row, last row + 1 of the expert) of each
tile of TILE rows, and behind them the experts by falling number of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_tiles(offsets, tiles, by_rows, num_experts, TILE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """Write the tiles of one expert, and its place among the experts by rows; a program for each expert."""
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + e, mask=e < num_experts, other=0)
    rows = tl.load(offsets + e + 1, mask=e < num_experts, other=0) - starts
    counts = (rows + TILE - 1) // TILE
    first = tl.sum(tl.where(e < expert, counts, 0))
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    own = (end - start + TILE - 1) // TILE
    for chunk in range(0, own, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        entry = tiles + 1 + 3 * (first + i)
        tl.store(entry, tl.full([CHUNK], expert, tl.int32), mask=i < own)
        tl.store(entry + 1, start + i * TILE, mask=i < own)
        tl.store(entry + 2, tl.full([CHUNK], 0, tl.int32) + end, mask=i < own)
    if expert == 0:
        tl.store(tiles, tl.sum(counts))
    ahead = (rows > end - start) | ((rows == end - start) & (e < expert))
    tl.store(by_rows + tl.sum(tl.where(ahead & (e < num_experts), 1, 0)), expert)


@triton.jit
def tile_at(tiles, count, columns, index, GROUP: tl.constexpr):
    """Return (expert, row, end, column tile) of the index-th tile, GROUP tiles of rows after another for each column."""
    in_group = index % (GROUP * columns)
    first = index // (GROUP * columns) * GROUP
    size = tl.minimum(count - first, GROUP)
    entry = tiles + 1 + 3 * (first + in_group % size)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), in_group // size


@triton.jit
def matrix_tile_at(rows, columns, index, GROUP: tl.constexpr):
    """Return (row tile, column tile) of the index-th tile of a matrix, in groups of GROUP row tiles."""
    in_group = index % (GROUP * columns)
    first = index // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + in_group % size, in_group // size
