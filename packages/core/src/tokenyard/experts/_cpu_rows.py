"""How rows stand in the `cpu` kernel, and what is done with them: weighting, and summing each token's."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.interfaces import Plan, logits_dtype

_MULTIPLE = {torch.bfloat16: 64, torch.float16: 64}
"""Of which the rows of an expert are a multiple. oneDNN compiles a product for each shape that it meets, which takes
longer than the product; so the shapes must come again though the counts differ from step to step."""


class Layout(NamedTuple):
    """Rows by expert, each expert's filled up to a multiple by copies of its last one, which have weight zero."""

    tokens: Tensor  # [L] the token of each row
    weights: Tensor  # [L, 1] float32 at least
    slots: Tensor  # [T, K] the row of each slot; `rows`, which is past the last one, for a dropped slot
    segments: list[
        tuple[int, int, int]
    ]  # (expert, first row, last row + 1) of every expert that has rows
    rows: int  # a bound on L that depends on shapes alone


def rows_bound(rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return the most rows that a layout of so many rows of a plan can have."""
    return rows + num_experts * (_MULTIPLE.get(dtype, 1) - 1)


def lay_out(plan: Plan, topk_weights: Tensor | None, dtype: torch.dtype) -> Layout:
    """Return the layout of a plan's rows for products in a dtype."""
    multiple, counts = _MULTIPLE.get(dtype, 1), plan.offsets.diff()
    ends = ((counts + multiple - 1) // multiple * multiple).cumsum(0)
    starts = ends - ends.diff(prepend=ends.new_zeros(1))
    live = int(plan.offsets[-1])
    row = torch.arange(int(ends[-1]), device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    place = row - starts[expert]
    source = plan.offsets[expert] + torch.minimum(place, counts[expert] - 1)
    slot = plan.order[source]
    wide = logits_dtype(dtype)
    weights = (
        torch.ones_like(row, dtype=wide) if topk_weights is None else topk_weights.reshape(-1)[slot]
    )
    weights = torch.where(place < counts[expert], weights, 0).unsqueeze(1)
    rows = rows_bound(plan.order.shape[0], counts.shape[0], dtype)
    kept = plan.order.new_full((plan.inverse.shape[0],), rows)
    kept[plan.order[:live]] = row[place < counts[expert]].to(kept.dtype)
    bounds = enumerate(pairwise([0, *ends.tolist()]))
    segments = [(e, a, b) for e, (a, b) in bounds if b > a]
    return Layout(slot // plan.top_k, weights, kept.view(-1, plan.top_k), segments, rows)


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Return rows [n, .] times weights [n, 1], rounded once to the rows' dtype."""
    return (rows * weights).to(rows.dtype)


def rows_to_fill(layout: Layout, width: int, dtype: torch.dtype) -> Tensor:
    """Return [rows + 1, width] to write rows into; the last one is zero and stands for every dropped slot."""
    out = torch.empty(layout.rows + 1, width, dtype=dtype)
    out[-1] = 0
    return out


def sum_by_token(rows: Tensor, layout: Layout) -> Tensor:
    """Sum each token's rows to [T, D], in float32 at least; those of dropped slots are not read."""
    return F.embedding_bag(layout.slots, rows, mode="sum")
