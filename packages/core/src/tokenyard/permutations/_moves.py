"""Move rows by a plan, without autograd. Each of the two moves is the gradient of the other."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.interfaces import Plan, logits_dtype


def live_rows(plan: Plan) -> Tensor:
    """Return [R, 1] bool: True for rows before the tail."""
    rows = torch.arange(plan.order.shape[0], device=plan.order.device, dtype=torch.int32)
    return (rows < plan.offsets[-1]).unsqueeze(1)


def kept_slots(plan: Plan) -> Tensor:
    """Return [T, K] bool: True for slots that are not dropped."""
    return (plan.inverse < plan.offsets[-1]).view(-1, plan.top_k)


def to_rows(x: Tensor, plan: Plan) -> Tensor:
    """Gather tokens x [T, D] to rows [R, D]. The tail is zero, even if x holds NaN."""
    rows = x.index_select(0, plan.order // plan.top_k)
    return torch.where(live_rows(plan), rows, rows.new_zeros(()))


def slots_to_rows(slots: Tensor, plan: Plan) -> Tensor:
    """Gather one value per slot [T, K] to one per row [R, 1]. The tail is zero."""
    rows = slots.reshape(-1).index_select(0, plan.order).unsqueeze(1)
    return torch.where(live_rows(plan), rows, rows.new_zeros(()))


def rows_to_slots(rows: Tensor, plan: Plan) -> Tensor:
    """Gather rows [R, D] to slots [T, K, D]. Dropped slots are zero. The tail is never read."""
    num_rows = rows.shape[0]
    shape = (plan.inverse.shape[0] // plan.top_k, plan.top_k, rows.shape[1])
    if num_rows == 0:
        return rows.new_zeros(shape)
    # dropped slots have an inverse >= offsets[-1], which may be past the last row
    slots = rows.index_select(0, plan.inverse.clamp(max=num_rows - 1)).view(shape)
    return torch.where(kept_slots(plan).unsqueeze(-1), slots, slots.new_zeros(()))


def to_tokens(rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
    """Return [T, D]: the sum of each token's rows [R, D], in float32 at least.

    topk_weights [T, K] weight the rows; None means 1.
    """
    slots = rows_to_slots(rows, plan).to(logits_dtype(rows.dtype))
    if topk_weights is not None:
        slots = slots * torch.where(kept_slots(plan), topk_weights, 0).unsqueeze(-1)
    return slots.sum(1).to(rows.dtype)
