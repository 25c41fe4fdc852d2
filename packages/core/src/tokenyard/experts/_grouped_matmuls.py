"""Grouped matmuls over rows sorted by expert, in plain torch.

They use ``F.grouped_mm`` if it is correct and fast: bfloat16 on a GPU of compute capability 9.0 or
later, with widths that are multiples of 16 bytes. Otherwise each expert is one matmul, which needs
a host sync on a GPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def rows_times(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return [R, N]: rows [R, M] times the matrix of each row's expert, in weights [E, M, N].

    The tail is undefined: to zero it would take another pass over the result.
    """
    if _grouped_mm_fits(rows, weights.shape[-1]):
        return F.grouped_mm(rows, weights, offs=offsets[1:])
    out = rows.new_zeros(rows.shape[0], weights.shape[-1])
    for e, start, end in segments(offsets):
        torch.mm(rows[start:end], weights[e], out=out[start:end])
    return out


def rows_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, M, N]: for each expert, its rows of left [R, M], transposed, times right [R, N].

    The tail is not read. An expert without rows has a zero matrix, which ``F.grouped_mm`` leaves
    undefined.
    """
    experts = offsets.shape[0] - 1
    if _grouped_mm_fits(left, right.shape[1]):
        live = _live(left, offsets)
        left = torch.where(live, left, left.new_zeros(()))
        right = torch.where(live, right, right.new_zeros(()))
        out = F.grouped_mm(left.t(), right, offs=offsets[1:])
        return torch.where((offsets.diff() > 0).view(-1, 1, 1), out, out.new_zeros(()))
    out = left.new_zeros(experts, left.shape[1], right.shape[1])
    for e, start, end in segments(offsets):
        torch.mm(left[start:end].t(), right[start:end], out=out[e])
    return out


def rows_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, N]: the sum of each expert's rows [R, N], accumulated in float32 at least."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    out = wide.new_zeros(offsets.shape[0] - 1, rows.shape[1])
    for e, start, end in segments(offsets):
        out[e] = wide[start:end].sum(0)
    return out.to(rows.dtype)


def add_bias(rows: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Return rows [R, N] plus the bias of each row's expert, in bias [E, N]."""
    return rows if bias is None else rows + bias.index_select(0, row_experts(rows, offsets))


def row_experts(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return [R]: the expert of each row. The tail, which is never read, gets the last expert."""
    index = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:], index, right=True).clamp(max=offsets.shape[0] - 2)


def _live(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return [R, 1] bool: True for rows before the tail."""
    return (torch.arange(rows.shape[0], device=rows.device) < offsets[-1]).unsqueeze(1)


def segments(offsets: Tensor) -> list[tuple[int, int, int]]:
    """Return (expert, first row, last row + 1) of each expert that has rows. Needs a host sync."""
    bounds = enumerate(pairwise(offsets.tolist()))
    return [(e, start, end) for e, (start, end) in bounds if end > start]


def _grouped_mm_fits(rows: Tensor, columns: int) -> bool:
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or rows.shape[0] == 0:
        return False
    return (
        rows.shape[1] % 8 == 0
        and columns % 8 == 0
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )
