"""The order in which programs compute output tiles, built on the device from the plan's offsets.

A *tile list* holds int32 numbers: first how many tiles of TILE rows there are, then a counter for
``_gluon_queue``, then FIELDS numbers for each tile. These are its expert and, of the tile's group,
the first row, the end of the expert's rows, the first tile and the number of tiles.

A group is all tiles of an expert, or an even part of them if there are more than GROUP. Programs
compute a group's rows for one column tile of the weights after another. So the weights are read
once, and the rows stay in cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(5)


@triton.jit
def list_tiles(
    offsets,  # [E + 1]
    tiles,  # [2 + FIELDS * most tiles], the tile list
    by_rows,  # [E] experts, those with most rows first
    num_experts,  # E
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write one expert's tiles, and its rank among the experts by rows; one program per expert."""
    # The rows of all experts, and the tiles of the experts before this one.
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + e, mask=e < num_experts, other=0)  # [E]
    rows = tl.load(offsets + e + 1, mask=e < num_experts, other=0) - starts  # [E]
    counts = (rows + TILE - 1) // TILE  # [E]
    first = tl.sum(tl.where(e < expert, counts, 0))

    # This expert's tiles, in even groups of at most GROUP.
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    count = (end - start + TILE - 1) // TILE
    groups = tl.maximum((count + GROUP - 1) // GROUP, 1)
    size = tl.maximum((count + groups - 1) // groups, 1)
    for chunk in range(0, count, CHUNK):
        i = chunk + tl.arange(0, CHUNK)  # [CHUNK] tiles
        before = i // size * size  # the first tile of the group
        entry = tiles + 2 + FIELDS * (first + i)
        tl.store(entry, tl.full([CHUNK], 0, tl.int32) + expert, mask=i < count)
        tl.store(entry + 1, start + before * TILE, mask=i < count)
        tl.store(entry + 2, tl.full([CHUNK], 0, tl.int32) + end, mask=i < count)
        tl.store(entry + 3, first + before, mask=i < count)
        tl.store(entry + 4, tl.minimum(count - before, size), mask=i < count)
    if expert == 0:
        tl.store(tiles, tl.sum(counts))
        tl.store(tiles + 1, 0)

    # Rank: the number of experts with more rows; equal ones in the order of their ids.
    ahead = (rows > end - start) | ((rows == end - start) & (e < expert))
    tl.store(by_rows + tl.sum(tl.where(ahead & (e < num_experts), 1, 0)), expert)


@triton.jit
def tile_at(tiles, columns, index, TILE: tl.constexpr):
    """Return (expert, row, end, column tile) of the output tile `index`."""
    entry = tiles + 2 + FIELDS * (index // columns)
    first = tl.load(entry + 3)
    size = tl.load(entry + 4)
    in_group = index - first * columns
    return (
        tl.load(entry),
        tl.load(entry + 1) + in_group % size * TILE,
        tl.load(entry + 2),
        in_group // size,
    )


@triton.jit
def matrix_tile_at(rows, columns, index, GROUP: tl.constexpr):
    """Return (row tile, column tile) of a matrix's tile `index`, in groups of GROUP row tiles."""
    in_group = index % (GROUP * columns)
    first = index // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + in_group % size, in_group // size


@triton.jit
def first_block(start, expert):
    """Return an expert's first block of 128 rows, if blocks hold rows of one expert only.

    Its rows begin at `start`. If it has n rows, the next expert's first block is at least
    n // 128 + 1 blocks later.
    """
    return start // 128 + expert
