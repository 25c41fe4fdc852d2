"""The plan as a custom operator of two launches, or of one for few slots."""

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
    counts=Array(torch.int32, optional=True),
    order=_INTS,
    inverse=_INTS,
    offsets=_INTS,
    slots=Int(),
    rows=Int(),
    experts=Int(),
    slots_of_block=Int(),
)
KERNELS = (COUNT, PLACE)

_BLOCKS = 128  # blocks, at most: each sums the counts of all blocks
_SLOTS = 512  # slots per block, at least
_FEW = 2048  # slots, up to which one block does everything
_WARPS = 16  # warps per block of PLACE; fewer if the counters of many experts fill shared memory
_THREADS = 1024  # threads per block of COUNT

MOST_EXPERTS = SHARED // 4 // 3 - 1
"""Limit of shared memory: three counters per expert, even for a block of one warp."""


@operator("tokenyard_cuda::plan", kept=True)
def plan_op(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return order [rows], inverse [N] and offsets [E + 1] for topk_ids [T, K]."""
    slots = topk_ids.numel()
    buckets = num_experts + 1  # the last one holds the dropped slots
    order, inverse, offsets = _empty(topk_ids, num_experts, rows)
    if slots == 0:
        return order, inverse, offsets.zero_()
    ids = topk_ids.int().contiguous()
    warps = fitting_warps(_WARPS, buckets, 2 * buckets)
    least = slots if slots <= _FEW else max(_SLOTS, ceil_div(slots, _BLOCKS))
    slots_of_block = round_up(least, warps * WARP)
    blocks = ceil_div(slots, slots_of_block)
    counts = None
    if blocks > 1:
        counts = order.new_empty(blocks, buckets)
        COUNT(
            (blocks, 1),
            _THREADS,
            ids,
            counts,
            slots,
            num_experts,
            slots_of_block,
            shared=4 * buckets,
        )
    PLACE(
        (blocks, 1),
        warps * WARP,
        ids,
        counts,
        order,
        inverse,
        offsets,
        slots,
        rows,
        num_experts,
        slots_of_block,
        shared=4 * buckets * (2 + warps),
    )
    return order, inverse, offsets


@plan_op.fake
def _(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(topk_ids, num_experts, rows)


def _empty(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (rows, topk_ids.numel(), num_experts + 1)
    order, inverse, offsets = (topk_ids.new_empty(size, dtype=torch.int32) for size in sizes)
    return order, inverse, offsets
