"""Moving rows by a plan, without autograd: the two moves are each other's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.interfaces import Plan, logits_dtype


def live_rows(plan: Plan) -> Tensor:
    """Return [R, 1] bool: which rows stand before the tail."""
    rows = torch.arange(plan.order.shape[0], device=plan.order.device, dtype=torch.int32)
    return (rows < plan.offsets[-1]).unsqueeze(1)


def kept_slots(plan: Plan) -> Tensor:
    """Return [T, K] bool: which slots were not dropped."""
    return (plan.inverse < plan.offsets[-1]).view(-1, plan.top_k)


def to_rows(x: Tensor, plan: Plan) -> Tensor:
    """Copy tokens x [T, D] to rows [R, D]; the tail is zero whatever x holds."""
    rows = x.index_select(0, plan.order // plan.top_k)
    return torch.where(live_rows(plan), rows, rows.new_zeros(()))


def slots_to_rows(slots: Tensor, plan: Plan) -> Tensor:
    """Copy one value a slot [T, K] to one a row [R, 1]; the tail is zero."""
    rows = slots.reshape(-1).index_select(0, plan.order).unsqueeze(1)
    return torch.where(live_rows(plan), rows, rows.new_zeros(()))


def rows_to_slots(rows: Tensor, plan: Plan) -> Tensor:
    """Copy rows [R, D] to their slots [T, K, D]; dropped slots are zero, and the tail is never read."""
    bound = rows.shape[0]
    shape = (plan.inverse.shape[0] // plan.top_k, plan.top_k, rows.shape[1])
    if bound == 0:
        return rows.new_zeros(shape)
    slots = rows.index_select(0, plan.inverse.clamp(max=bound - 1)).view(shape)
    return torch.where(kept_slots(plan).unsqueeze(-1), slots, slots.new_zeros(()))


def to_tokens(rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
    """Sum each token's rows [R, D], weighted if weights [T, K] are given, in float32 at least, to [T, D]."""
    slots = rows_to_slots(rows, plan).to(logits_dtype(rows.dtype))
    if topk_weights is not None:
        slots = slots * torch.where(kept_slots(plan), topk_weights, 0).unsqueeze(-1)
    return slots.sum(1).to(rows.dtype)
