"""The plan as a custom op of two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.operators import operator
from tokenyard_kernels_cuda.ops._sizes import SHARED, WARP, ceil_div, fitting_warps, round_up
from tokenyard_kernels_cuda.toolchain import Array, Int, Kernel, Source

_SOURCE = Source("plan.cu")
_INTS = Array(torch.int32)
COUNT = Kernel(
    _SOURCE,
    "count_slots",
    ids=_INTS,
    counts=_INTS,
    slots=Int(),
    experts=Int(),
    slots_of_block=Int(),
)
PLACE = Kernel(
    _SOURCE,
    "place_slots",
    ids=_INTS,
    counts=_INTS,
    order=_INTS,
    inverse=_INTS,
    offsets=_INTS,
    slots=Int(),
    rows=Int(),
    experts=Int(),
    slots_of_block=Int(),
)
KERNELS = (COUNT, PLACE)

_BLOCKS = 128  # at most: each adds up the counts of all
_SLOTS = 512  # of a block, at least
_WARPS = 16  # of a block that places slots, unless there are so many experts that their counters need too much room
_THREADS = 1024  # of a block that counts

MOST_EXPERTS = SHARED // 4 // 3 - 1
"""Of each, a block has three counters in shared memory even if it is one warp."""


@operator("tokenyard_cuda::plan")
def plan_op(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return order [rows], inverse [N] and offsets [E + 1] of topk_ids [T, K]."""
    slots, buckets = topk_ids.numel(), num_experts + 1
    order, inverse, offsets = _empty(topk_ids, num_experts, rows)
    if slots == 0:
        return order, inverse, offsets.zero_()
    ids = topk_ids.int().contiguous()
    warps = fitting_warps(_WARPS, buckets, 2 * buckets)
    slots_of_block = round_up(max(_SLOTS, ceil_div(slots, _BLOCKS)), warps * WARP)
    blocks = ceil_div(slots, slots_of_block)
    counts = order.new_empty(blocks, buckets)
    COUNT(
        (blocks, 1), _THREADS, ids, counts, slots, num_experts, slots_of_block, shared=4 * buckets
    )
    arguments = (ids, counts, order, inverse, offsets, slots, rows, num_experts, slots_of_block)
    PLACE((blocks, 1), warps * WARP, *arguments, shared=4 * buckets * (2 + warps))
    return order, inverse, offsets


@torch.library.register_fake(plan_op)
def _(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(topk_ids, num_experts, rows)


def _empty(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (rows, topk_ids.numel(), num_experts + 1)
    order, inverse, offsets = (topk_ids.new_empty(size, dtype=torch.int32) for size in sizes)
    return order, inverse, offsets
