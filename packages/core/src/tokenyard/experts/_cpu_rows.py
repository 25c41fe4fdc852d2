"""Rows of the `cpu` kernel: weighting them, and summing each token's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.interfaces import Plan
from tokenyard.permutations._moves import slots_to_rows


def row_weights(topk_weights: Tensor | None, plan: Plan) -> Tensor | None:
    """Return each row's weight [R, 1], if there are weights."""
    return None if topk_weights is None else slots_to_rows(topk_weights, plan)


def weighted(rows: Tensor, by_row: Tensor | None, first: int) -> Tensor:
    """Return rows [n, .] times the weights of the rows from `first`, rounded once to the rows' dtype."""
    if by_row is None:
        return rows
    return (rows * by_row[first : first + rows.shape[0]]).to(rows.dtype)


def summands(rows: int, like: Tensor) -> Tensor:
    """Return [R + 1, D] to write rows into; the last one stays zero and stands for every dropped slot."""
    out = like.new_empty(rows + 1, like.shape[1])
    out[-1] = 0
    return out


def sum_by_token(rows: Tensor, plan: Plan) -> Tensor:
    """Sum each token's rows to [T, D], in float32 at least; those of dropped slots are not read."""
    slots = torch.where(plan.inverse < plan.offsets[-1], plan.inverse, rows.shape[0] - 1)
    return F.embedding_bag(slots.view(-1, plan.top_k), rows, mode="sum")
