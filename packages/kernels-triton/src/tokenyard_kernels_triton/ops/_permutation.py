"""Permute and unpermute as custom operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard.operators import operator, refuse_second_derivative
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.ops._moves import dot_with_rows, to_rows, to_tokens


@operator("tokenyard_triton::permute")
def permute_op(
    x: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
) -> Tensor:
    """Copy tokens x [T, D], weighted if weights [T, K] are given, to rows [R, D]; zero the tail."""
    if order.shape[0] == 0:
        return x.new_empty(0, x.shape[1])
    with on_device_of(x):
        weights = None if topk_weights is None else topk_weights.contiguous()
        return to_rows(x.contiguous(), Plan(order, inverse, offsets, top_k), weights, tail=True)


@permute_op.fake
def _(
    x: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@operator("tokenyard_triton::unpermute")
def unpermute_op(
    rows: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
) -> Tensor:
    """Sum each token's rows [R, D], weighted if weights [T, K] are given, to [T, D]."""
    if inverse.shape[0] == 0:
        return rows.new_empty(0, rows.shape[1])
    with on_device_of(rows):
        weights = None if topk_weights is None else topk_weights.contiguous()
        return to_tokens(rows.contiguous(), Plan(order, inverse, offsets, top_k), weights)


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


@operator("tokenyard_triton::unpermute_weights_backward")
def weights_backward_op(
    dy: Tensor, rows: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int
) -> Tensor:
    """Return [T, K] float32: the dot products of dy [T, D] and the token's rows; 0 if dropped."""
    if inverse.shape[0] == 0:
        return dy.new_empty(0, top_k, dtype=torch.float32)
    with on_device_of(dy):
        return dot_with_rows(
            dy.contiguous(), rows.contiguous(), Plan(order, inverse, offsets, top_k)
        )


@weights_backward_op.fake
def _(
    dy: Tensor, rows: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int
) -> Tensor:
    return dy.new_empty(dy.shape[0], top_k, dtype=torch.float32)


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weights, order, inverse, offsets, ctx.top_k = inputs
    ctx.save_for_backward(weights, order, inverse, offsets)


def _permute_backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    return unpermute_op(drows, *ctx.saved_tensors, ctx.top_k), None, None, None, None, None


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, order, inverse, offsets, ctx.top_k = inputs
    ctx.save_for_backward(None if weights is None else rows, weights, order, inverse, offsets)


def _unpermute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("triton")
    rows, weights, *plan = ctx.saved_tensors
    need_rows, need_weights = ctx.needs_input_grad[:2]
    drows = permute_op(dy, weights, *plan, ctx.top_k) if need_rows else None
    dweights = weights_backward_op(dy, rows, *plan, ctx.top_k) if need_weights else None
    return drows, dweights, None, None, None, None


permute_op.differentiable(_permute_backward, _save_plan)
unpermute_op.differentiable(_unpermute_backward, _save_rows)
