"""The plan as a custom operator of three launches, or of one for few slots."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.operators import operator
from tokenyard_kernels_triton._device import ceil_div, on_device_of, power_of_two
from tokenyard_kernels_triton.kernels import _plan
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.replay import replayed

_SLOTS = 256  # of a block
_BUCKETS = 32  # counted at a time
_BLOCKS = 256  # added up at a time
_FEW = 2048  # slots, up to which one launch is faster


@operator("tokenyard_triton::plan", kept=True)
def plan_op(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return order [rows], inverse [N] and offsets [E + 1] of topk_ids [T, K]."""
    slots = topk_ids.numel()
    if slots == 0:
        order, inverse, offsets = _empty(topk_ids, num_experts, rows)
        return order, inverse, offsets.zero_()

    def launches(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order, inverse, offsets = _empty(ids, num_experts, rows)
        launch_all = _launch_at_once if slots <= _FEW else _launch_by_blocks
        launch_all(ids, order, inverse, offsets)
        return order, inverse, offsets

    ids = topk_ids.contiguous()
    with on_device_of(ids):
        order, inverse, offsets = replayed(("plan", slots, num_experts, rows), launches, (ids,))
    return order, inverse, offsets


def _launch_by_blocks(ids: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor) -> None:
    slots = ids.numel()
    num_experts = offsets.numel() - 1
    blocks = ceil_div(slots, _SLOTS)
    counts = order.new_empty(blocks, num_experts + 1)
    totals = order.new_empty(num_experts + 1)
    buckets = min(_BUCKETS, power_of_two(num_experts + 1))
    launch(_plan.count_blocks, (blocks,))(
        ids, counts, slots, num_experts, SLOTS=_SLOTS, BUCKETS=buckets
    )
    few = min(8, buckets)
    launch(_plan.add_up_blocks, (ceil_div(num_experts + 1, few),))(
        counts, totals, blocks, num_experts, BLOCKS=_BLOCKS, BUCKETS=few
    )
    launch(_plan.place_slots, (blocks,))(
        ids,
        counts,
        totals,
        order,
        inverse,
        offsets,
        slots,
        order.numel(),
        num_experts,
        SLOTS=_SLOTS,
        CHUNK=32,
        EXPERTS=power_of_two(num_experts + 2),
    )


def _launch_at_once(ids: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor) -> None:
    blocks = ceil_div(max(ids.numel(), offsets.numel()), 32)
    launch(_plan.plan_at_once, (blocks,))(
        ids,
        order,
        inverse,
        offsets,
        ids.numel(),
        order.numel(),
        offsets.numel() - 1,
        SLOTS=32,
        CHUNK=64,
    )


@plan_op.fake
def _(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(topk_ids, num_experts, rows)


def _empty(topk_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (rows, topk_ids.numel(), num_experts + 1)
    order, inverse, offsets = (topk_ids.new_empty(size, dtype=torch.int32) for size in sizes)
    return order, inverse, offsets
