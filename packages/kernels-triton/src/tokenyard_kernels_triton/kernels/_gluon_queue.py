"""A queue of output tiles, from which the programs of a matmul for Hopper GPUs take the next one.

There are as many programs as multiprocessors, and they do not take equally long. A multiprocessor
that runs a kernel of another stream, such as NCCL's, starts its program late. The last tile of an
expert may have few rows. Some programs' loads take longer. So a program that is done with a tile
takes the next one that no program has.

The first tile of a program has its own number. For each tile that it loads, a loader claims one
more: it adds one to the tile list's counter, shortly before the tile's last slices. The number
reaches both warp groups, and the loader's other warps, through shared memory. The counter is zero
before and after a matmul: as many numbers are claimed as there are tiles, so the program that
claims the last one resets it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tokenyard_kernels_triton.kernels._gluon_pipeline import barriers

_SLOTS = gl.constexpr(2)  # numbers in shared memory
_SLICES_AFTER_CLAIM = gl.constexpr(2)  # of a tile


@gluon.constexpr_function
def _thread_layout(WARPS):
    """Return the layout of one number a thread."""
    return gl.BlockedLayout([1], [32], [WARPS], [0])


@gluon.jit
def tile_queue(WARPS: gl.constexpr):
    """Allocate a program's part of a queue, for a loader of WARPS warps."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [_SLOTS, 32 * WARPS], layout)
    ready = barriers(_SLOTS, 1)  # completed by the loader
    free = barriers(_SLOTS, 3)  # completed by both warp groups and the loader
    return numbers, ready, free


@gluon.jit
def slices_before_claim(steps):
    """Return how many of a tile's slices are loaded before the next tile is claimed."""
    return gl.maximum(steps - _SLICES_AFTER_CLAIM, 0)


@gluon.jit
def claim_tile(counter, WARPS: gl.constexpr):
    """Start claiming a tile; the first thread of the loader gets its number."""
    layout: gl.constexpr = _thread_layout(WARPS)
    thread = gl.arange(0, 32 * WARPS, layout)
    one = gl.full([32 * WARPS], 1, gl.int32, layout)
    return gl.atomic_add(counter + thread, one, mask=thread == 0, sem="relaxed")


@gluon.jit
def publish_tile(
    queue,
    counter,
    claimed,  # what `claim_tile` returned
    tile,  # number of the tile that was just loaded, from 0
    total,  # tiles of all programs
    WARPS: gl.constexpr,  # of the loader
    PROGRAMS: gl.constexpr,
):
    """Tell all partitions which tile was claimed, and return its index."""
    numbers, ready, free = queue
    slot = tile % _SLOTS
    mbarrier.wait(free.index(slot), ((tile // _SLOTS) & 1) ^ 1)
    numbers.index(slot).store(claimed)
    mbarrier.arrive(ready.index(slot))
    index = next_tile(queue, tile, WARPS, PROGRAMS)
    gl.store(counter, 0, mask=index == PROGRAMS + total - 1)  # the last number that is claimed
    return index


@gluon.jit
def next_tile(
    queue,
    tile,  # number of the tile that was just computed, from 0
    WARPS: gl.constexpr,  # of the partition
    PROGRAMS: gl.constexpr,
):
    """Return the index of the program's next tile."""
    numbers, ready, free = queue
    slot = tile % _SLOTS
    mbarrier.wait(ready.index(slot), (tile // _SLOTS) & 1)
    number = numbers.index(slot).slice(0, 1).load(_thread_layout(WARPS))
    mbarrier.arrive(free.index(slot))
    return PROGRAMS + gl.max(number, 0)
