"""How products stream through a Hopper multiprocessor, in Gluon: a warp that loads, and two warpgroups that multiply.

Each program walks over output tiles of 128 rows, 64 for each warpgroup, and COLUMNS columns. The loader runs ahead by
STAGES slices of what is summed over, across tiles, so that the next tile's operands are there when a tile is done. The
warpgroups do not wait for each other; where a tile's rows end before those of the second one begin, it only passes its
slices on, so that an expert's rows cost what they would if padded to 64. Results leave by the copy engine through
BUFFERS small buffers of each warpgroup, CHUNK columns at a time.

Operands and results are tensor descriptors. Rows sorted by expert are *ragged*: a box that reaches past the last row of
its expert reads zeros there and writes nothing. The copy engine does both by itself if the matrix is described with two
more dimensions, whose strides add up to an address that wraps around 2^64: an idea of ``triton.tools.ragged_tma``. So
rows are described as [., ., R, part, W], and weights as [E, part, M, N].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # as Triton 3.6 calls it
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def ragged_at(row, end, part, column):
    """Return the coordinates of a box of ragged rows that begins at `row` and ends before `end`."""
    many = 0x40000000
    return [many, end, many - (end - row), part, column]


@gluon.jit
def barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Make a barrier for each stage, which COUNT arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def accumulate(
    a,
    b,
    full,
    empty,
    done,
    steps,
    A_BY_DEPTH: gl.constexpr,
    B_BY_DEPTH: gl.constexpr,
    COLLECTED: gl.constexpr,
    WARPGROUP: gl.constexpr,
    DEPTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Return the sum [64, COLUMNS] of the products of `steps` slices, after `done` ones.

    BY_DEPTH: the first dimension of a slice is what is summed over. COLLECTED: threads brought one of the operands.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    total = gl.zeros([64, COLUMNS], gl.float32, layout)
    for k in range(done, done + steps):
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        if COLLECTED:
            fence_async_shared()
        left, right = a.index(2 * stage + WARPGROUP), b.index(stage)
        if A_BY_DEPTH:
            left = left.reshape([DEPTH, 64]).permute([1, 0])
        else:
            left = left.reshape([64, DEPTH])
        if B_BY_DEPTH:
            right = right.reshape([DEPTH, COLUMNS])
        else:
            right = right.reshape([COLUMNS, DEPTH]).permute([1, 0])
        total = warpgroup_mma(left, right, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(empty.index((k + STAGES - 1) % STAGES), pred=k > done)
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(empty.index((done + steps + STAGES - 1) % STAGES), pred=steps > 0)
    return total


@gluon.jit
def pass_on(
    full,
    empty,
    done,
    steps,
    STAGES: gl.constexpr,
):
    """Let `steps` slices go unused, after `done` ones."""
    for k in range(done, done + steps):
        mbarrier.wait(full.index(k % STAGES), (k // STAGES) & 1)
        mbarrier.arrive(empty.index(k % STAGES))


@gluon.jit
def _halves(tile, COLUMNS: gl.constexpr):
    return tile.reshape([64, 2, COLUMNS // 2]).permute([0, 2, 1]).split()


@gluon.jit
def piece(tile, INDEX: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr):
    """Return the INDEX-th CHUNK columns of a tile [64, COLUMNS]; nothing moves."""
    if COLUMNS == CHUNK:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        return gl.convert_layout(tile, layout, assert_trivial=True)
    else:
        one, two = _halves(tile, COLUMNS)
        HALF: gl.constexpr = COLUMNS // 2
        if INDEX * CHUNK < HALF:
            return piece(one, INDEX, HALF, CHUNK)
        else:
            return piece(two, INDEX - HALF // CHUNK, HALF, CHUNK)
