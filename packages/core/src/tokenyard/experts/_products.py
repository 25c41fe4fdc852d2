"""The two grouped products of an expert layer, over rows sorted by expert, in plain torch.

``F.grouped_mm`` is taken where it is right and fast: bfloat16 on a GPU of capability 9.0 or later, with widths that
are multiples of 16 bytes. It leaves the tail and empty groups undefined, so both are zeroed here. Elsewhere each expert
is one matrix product; on a GPU that reads the offsets on the host.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def rows_times(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return [R, N]: each expert's rows [., M] times its matrix of weights [E, M, N]; the tail is zero."""
    if _grouped_mm_fits(rows, weights.shape[-1]):
        out = F.grouped_mm(rows, weights, offs=offsets[1:])
        return torch.where(_live(rows, offsets), out, out.new_zeros(()))
    out = rows.new_zeros(rows.shape[0], weights.shape[-1])
    for e, start, end in segments(offsets):
        torch.mm(rows[start:end], weights[e], out=out[start:end])
    return out


def rows_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, M, N]: over each expert's rows, left [R, M] transposed times right [R, N]; zero where it has none."""
    experts = offsets.shape[0] - 1
    if _grouped_mm_fits(left, right.shape[1]):
        live = _live(left, offsets)
        left, right = (torch.where(live, t, t.new_zeros(())) for t in (left, right))
        out = F.grouped_mm(left.t(), right, offs=offsets[1:])
        return torch.where((offsets.diff() > 0).view(-1, 1, 1), out, out.new_zeros(()))
    out = left.new_zeros(experts, left.shape[1], right.shape[1])
    for e, start, end in segments(offsets):
        torch.mm(left[start:end].t(), right[start:end], out=out[e])
    return out


def rows_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, N]: the sum of each expert's rows [R, N], in float32 at least; zero if it has none."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    out = wide.new_zeros(offsets.shape[0] - 1, rows.shape[1])
    for e, start, end in segments(offsets):
        out[e] = wide[start:end].sum(0)
    return out.to(rows.dtype)


def add_bias(rows: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Return rows [R, N] plus the bias [E, N] of each row's expert."""
    return rows if bias is None else rows + bias.index_select(0, row_experts(rows, offsets))


def row_experts(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return [R]: the expert of each row; in the tail the last one, whose rows nobody reads."""
    index = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:], index, right=True).clamp(max=offsets.shape[0] - 2)


def _live(rows: Tensor, offsets: Tensor) -> Tensor:
    return (torch.arange(rows.shape[0], device=rows.device) < offsets[-1]).unsqueeze(1)


def segments(offsets: Tensor) -> list[tuple[int, int, int]]:
    """List (expert, first row, last row + 1) of every expert that has rows; copies the offsets to the host."""
    bounds = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]


def _grouped_mm_fits(rows: Tensor, columns: int) -> bool:
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or rows.shape[0] == 0:
        return False
    return (
        rows.shape[1] % 8 == 0
        and columns % 8 == 0
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )
