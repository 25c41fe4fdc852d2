"""Launches of the copies between tokens and rows; every function allocates what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import ceil_div, chained, power_of_two
from tokenyard_kernels_triton.kernels import _moves
from tokenyard_kernels_triton.launching import launch

_COLUMNS = 2048  # at most, for one program
_FEW = 128  # tokens, up to which one is summed by several programs
_COLUMNS_OF_FEW = 256  # of such a program
_COLUMNS_OF_MANY = 512  # at most, of a program of one warp that sums more tokens


def to_rows(
    x: Tensor, plan: Plan, topk_weights: Tensor | None = None, tail: bool = False
) -> Tensor:
    """Copy tokens x [T, D], weighted if weights [T, K] are given, to rows [R, D].

    The tail is zero if `tail`, else undefined.
    """
    tokens, dim = x.shape
    rows = x.new_empty(plan.order.shape[0], dim)
    columns = _columns(dim)
    grid = (tokens, ceil_div(dim, columns))
    live = plan.offsets[-1:]
    if topk_weights is None:
        launch(_moves.copy_to_rows, grid)(
            x, rows, plan.inverse, live, dim, TOP_K=plan.top_k, COLUMNS=columns
        )
    else:
        launch(_moves.weigh_to_rows, grid)(
            x, rows, plan.inverse, topk_weights, live, dim, TOP_K=plan.top_k, COLUMNS=columns
        )
    if tail:
        launch(_moves.clear_tail, (ceil_div(len(rows), 32), ceil_div(dim, 128)))(
            rows, live, len(rows), dim, ROWS=32, COLUMNS=128
        )
    return rows


def to_tokens(rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
    """Sum each token's rows [R, D] in float32 to [T, D], weighted if weights [T, K] are given."""
    dim = rows.shape[1]
    tokens = plan.inverse.shape[0] // plan.top_k
    y = rows.new_empty(tokens, dim)
    few = tokens <= _FEW
    columns = min(power_of_two(dim), _COLUMNS_OF_FEW if few else _COLUMNS_OF_MANY)
    launch(_moves.sum_to_tokens, (tokens, ceil_div(dim, columns)))(
        rows,
        y,
        plan.inverse,
        topk_weights,
        plan.offsets[-1:],
        dim,
        TOP_K=plan.top_k,
        COLUMNS=columns,
        WEIGHTED=topk_weights is not None,
        num_warps=4 if few else 1,
        **chained(rows.device),
    )
    return y


def dot_with_rows(dy: Tensor, rows: Tensor, plan: Plan) -> Tensor:
    """Return [T, K] float32: the dot products of dy [T, D] and the token's rows; 0 if dropped."""
    tokens, dim = dy.shape
    out = dy.new_empty(tokens, plan.top_k, dtype=torch.float32)
    launch(_moves.dot_with_rows, (tokens * plan.top_k,))(
        dy, rows, out, plan.inverse, plan.offsets[-1:], dim, TOP_K=plan.top_k, COLUMNS=_columns(dim)
    )
    return out


def sum_dots(dots: Tensor, plan: Plan) -> Tensor:
    """Return [T, K] float32: the sums of the slots' rows of dots [R, some]; 0 if dropped."""
    slots = plan.inverse.shape[0]
    out = dots.new_empty(slots // plan.top_k, plan.top_k)
    width = dots.shape[1]
    columns = power_of_two(width)
    launch(_moves.sum_dots, (ceil_div(slots, 128),))(
        dots,
        out,
        plan.inverse,
        plan.offsets[-1:],
        slots,
        SLOTS=128,
        WIDTH=width,
        COLUMNS=columns,
        **chained(dots.device),
    )
    return out


def _columns(dim: int) -> int:
    return min(_COLUMNS, power_of_two(dim))
