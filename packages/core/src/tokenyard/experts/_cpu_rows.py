"""Padded rows of the `cpu` kernel: build them from a plan, weight them, and sum them by token.

Shapes: L padded rows over all experts, T tokens, K experts per token, N = T*K slots, E experts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.interfaces import Plan, logits_dtype

_MULTIPLE = {torch.bfloat16: 64, torch.float16: 64}
"""Each expert's rows are padded to a multiple of this number; other dtypes need no padding.

oneDNN compiles a matmul for each new shape, which takes longer than the matmul. Counts differ from
step to step, so padding makes the same few shapes come again.
"""


class PaddedRows(NamedTuple):
    """Rows sorted by expert. Padding rows repeat the expert's last row, with weight zero."""

    tokens: Tensor  # [L] the token of each row
    weights: Tensor  # [L, 1] float32 at least
    slots: Tensor  # [T, K] the row of each slot; a dropped slot has `max_rows`
    segments: list[tuple[int, int, int]]  # (expert, first row, last row + 1) of nonempty experts
    max_rows: int  # upper bound of L, known from shapes alone


def max_padded_rows(rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return the upper bound of L for a plan with `rows` rows."""
    return rows + num_experts * (_MULTIPLE.get(dtype, 1) - 1)


def pad_rows(plan: Plan, topk_weights: Tensor | None, dtype: torch.dtype) -> PaddedRows:
    """Return a plan's rows, padded for matmuls in `dtype`. topk_weights [T, K]; None means 1."""
    multiple = _MULTIPLE.get(dtype, 1)
    counts = plan.offsets.diff()  # [E] rows before padding
    padded_counts = (counts + multiple - 1) // multiple * multiple  # [E]
    ends = padded_counts.cumsum(0)  # [E] last padded row + 1
    starts = ends - padded_counts  # [E] first padded row

    # the source of each padded row: padding repeats the last row of the expert
    row = torch.arange(int(ends[-1]), device=ends.device)  # [L]
    expert = torch.searchsorted(ends, row, right=True)  # [L]
    position = row - starts[expert]  # [L] position within the expert
    is_padding = position >= counts[expert]  # [L]
    source = plan.offsets[expert] + torch.minimum(position, counts[expert] - 1)  # [L] row of plan
    slot = plan.order[source]  # [L]

    wide = logits_dtype(dtype)
    if topk_weights is None:
        weights = torch.ones_like(row, dtype=wide)  # [L]
    else:
        weights = topk_weights.reshape(-1)[slot]  # [L]
    weights = weights.masked_fill(is_padding, 0)

    # the inverse: the padded row of each slot that was not dropped
    max_rows = max_padded_rows(plan.order.shape[0], counts.shape[0], dtype)
    live = int(plan.offsets[-1])
    rows_of_slots = plan.order.new_full((plan.inverse.shape[0],), max_rows)  # [N]
    rows_of_slots[plan.order[:live]] = row[~is_padding].to(rows_of_slots.dtype)

    bounds = enumerate(pairwise([0, *ends.tolist()]))
    return PaddedRows(
        tokens=slot // plan.top_k,
        weights=weights.unsqueeze(1),
        slots=rows_of_slots.view(-1, plan.top_k),
        segments=[(e, start, end) for e, (start, end) in bounds if end > start],
        max_rows=max_rows,
    )


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Return rows [n, .] times weights [n, 1], rounded once to the dtype of the rows."""
    return (rows * weights).to(rows.dtype)


def new_rows(padded: PaddedRows, width: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised rows [max_rows + 1, width]. The last one is zero, for dropped slots."""
    out = torch.empty(padded.max_rows + 1, width, dtype=dtype)
    out[-1] = 0
    return out


def sum_by_token(rows: Tensor, padded: PaddedRows) -> Tensor:
    """Return [T, D], the sum of each token's rows in float32 at least.

    Does not read the rows of dropped slots.
    """
    return F.embedding_bag(padded.slots, rows, mode="sum")
