"""The `torch` permutation: stable sort and index_select, for any device.

It uses no atomics, so results are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard.operators import operator
from tokenyard.permutations._moves import (
    kept_slots,
    rows_to_slots,
    slots_to_rows,
    to_rows,
    to_tokens,
)
from tokenyard.workload import Workload


class TorchPermutation:
    """Makes plans and moves rows in plain torch."""

    def __init__(self, workload: Workload):
        pass

    def plan(self, topk_ids: Tensor, num_experts: int, rows: int | None = None) -> Plan:
        """Return the plan of topk_ids [T, K]: slots sorted by expert, dropped slots in the tail."""
        ids = topk_ids.reshape(-1).clamp(max=num_experts)  # [N]
        sorted_ids, order = ids.sort(stable=True)  # [N], [N]
        experts = torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype)
        offsets = torch.searchsorted(sorted_ids, experts, out_int32=True)  # [E + 1]
        positions = torch.arange(ids.numel(), device=ids.device, dtype=torch.int32)
        inverse = torch.empty_like(positions).scatter(0, order, positions)  # [N]
        num_rows = ids.numel() if rows is None else min(rows, ids.numel())
        return Plan(order[:num_rows].int(), inverse, offsets, topk_ids.shape[1])

    def permute(self, x: Tensor, plan: Plan) -> Tensor:
        """Gather tokens x [T, D] to rows [R, D]. The tail is zero."""
        return permute_op(x, *plan)

    def unpermute(self, rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
        """Return [T, D]: the sum of each token's rows [R, D], weighted by topk_weights [T, K]."""
        return unpermute_op(rows, topk_weights, *plan)


@operator("tokenyard::permute")
def permute_op(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """Gather tokens x [T, D] to rows [R, D]."""
    return to_rows(x, Plan(order, inverse, offsets, top_k))


@permute_op.fake
def _(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@operator("tokenyard::unpermute")
def unpermute_op(
    rows: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
) -> Tensor:
    """Return [T, D]: the sum of each token's rows [R, D], weighted by topk_weights [T, K]."""
    return to_tokens(rows, Plan(order, inverse, offsets, top_k), topk_weights)


@unpermute_op.fake
def _(
    rows: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
) -> Tensor:
    return rows.new_empty(inverse.shape[0] // top_k, rows.shape[1])


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, inverse, offsets, ctx.top_k = inputs
    ctx.save_for_backward(order, inverse, offsets)


def _permute_backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    return unpermute_op(drows, None, *ctx.saved_tensors, ctx.top_k), None, None, None, None


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, order, inverse, offsets, ctx.top_k = inputs
    ctx.save_for_backward(None if weights is None else rows, weights, order, inverse, offsets)


def _unpermute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, order, inverse, offsets = ctx.saved_tensors
    plan = Plan(order, inverse, offsets, ctx.top_k)
    drows: Tensor | None = None  # [R, D]
    dweights: Tensor | None = None  # [T, K]
    if ctx.needs_input_grad[0]:
        dy_rows: Tensor = permute_op(dy, *plan)
        if weights is None:
            drows = dy_rows
        else:
            drows = (dy_rows * slots_to_rows(weights, plan)).to(dy.dtype)
    if weights is not None and ctx.needs_input_grad[1]:
        dots = (rows_to_slots(rows, plan).to(weights.dtype) * dy.unsqueeze(1)).sum(-1)
        dweights = torch.where(kept_slots(plan), dots, 0)
    return drows, dweights, None, None, None, None


permute_op.differentiable(_permute_backward, _save_plan)
unpermute_op.differentiable(_unpermute_backward, _save_rows)
