"""Which tile a program computes next, from the plan's offsets, on the device.

A *tile list* holds, in int32, how many tiles of TILE rows there are, and FIELDS numbers for each: its expert, and of the
group of tiles that it belongs to the first row, the end of the expert's rows, the first tile and the number of tiles. A
group is an expert's tiles, or an even part of them where there are more than GROUP. Its rows are computed for one
column of weights after another, so that the weights are read once and the rows stay in cache meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(5)


@triton.jit
def list_tiles(
    offsets,
    tiles,
    by_rows,
    num_experts,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the tiles of one expert, and its place among the experts by falling rows; a program for each expert."""
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + e, mask=e < num_experts, other=0)
    rows = tl.load(offsets + e + 1, mask=e < num_experts, other=0) - starts
    counts = (rows + TILE - 1) // TILE
    first = tl.sum(tl.where(e < expert, counts, 0))
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    own = (end - start + TILE - 1) // TILE
    groups = tl.maximum((own + GROUP - 1) // GROUP, 1)
    size = tl.maximum((own + groups - 1) // groups, 1)
    for chunk in range(0, own, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        before = i // size * size
        entry = tiles + 1 + FIELDS * (first + i)
        tl.store(entry, tl.full([CHUNK], 0, tl.int32) + expert, mask=i < own)
        tl.store(entry + 1, start + before * TILE, mask=i < own)
        tl.store(entry + 2, tl.full([CHUNK], 0, tl.int32) + end, mask=i < own)
        tl.store(entry + 3, first + before, mask=i < own)
        tl.store(entry + 4, tl.minimum(own - before, size), mask=i < own)
    if expert == 0:
        tl.store(tiles, tl.sum(counts))
    ahead = (rows > end - start) | ((rows == end - start) & (e < expert))
    tl.store(by_rows + tl.sum(tl.where(ahead & (e < num_experts), 1, 0)), expert)


@triton.jit
def tile_at(tiles, columns, index, TILE: tl.constexpr):
    """Return (expert, row, end, column tile) of the index-th output tile."""
    entry = tiles + 1 + FIELDS * (index // columns)
    first, size = tl.load(entry + 3), tl.load(entry + 4)
    place = index - first * columns
    return (
        tl.load(entry),
        tl.load(entry + 1) + place % size * TILE,
        tl.load(entry + 2),
        place // size,
    )


@triton.jit
def matrix_tile_at(rows, columns, index, GROUP: tl.constexpr):
    """Return (row tile, column tile) of the index-th tile of a matrix, in groups of GROUP row tiles."""
    in_group = index % (GROUP * columns)
    first = index // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + in_group % size, in_group // size
