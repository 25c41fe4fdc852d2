"""Permute and unpermute as custom operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard.operators import operator, refuse_second_derivative
from tokenyard_kernels_cuda.ops._moves import to_rows, to_tokens, to_tokens_backward


@operator("tokenyard_cuda::permute")
def permute_op(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """Copy tokens x [T, D] to rows [R, D]; the tail is zero."""
    if inverse.shape[0] != x.shape[0] * top_k:
        slots = inverse.shape[0]
        raise ValueError(
            f"x has {x.shape[0]} tokens and the plan {slots} slots; there must be {top_k} a token"
        )
    if order.shape[0] == 0:
        return x.new_empty(0, x.shape[1])
    return to_rows(x.contiguous(), Plan(order, inverse, offsets, top_k))


@permute_op.fake
def _(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@operator("tokenyard_cuda::unpermute")
def unpermute_op(
    rows: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
) -> Tensor:
    """Sum each token's rows [R, D] to [T, D], weighted by topk_weights [T, K] unless None."""
    if inverse.shape[0] == 0:
        return rows.new_empty(0, rows.shape[1])
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


@operator("tokenyard_cuda::unpermute_backward")
def unpermute_backward_op(
    dy: Tensor,
    rows: Tensor | None,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
    want_rows: bool,
) -> list[Tensor]:
    """Return the gradients of rows [R, D] and of topk_weights [T, K].

    The first is empty unless `want_rows`; the second is empty if `rows` is None.
    """
    defaults = [dy.new_empty(0, dy.shape[1]), dy.new_empty(0, top_k, dtype=torch.float32)]
    if inverse.shape[0] == 0:
        return defaults
    weights = None if topk_weights is None else topk_weights.contiguous()
    rows = None if rows is None else rows.contiguous()
    plan = Plan(order, inverse, offsets, top_k)
    gradients = to_tokens_backward(dy.contiguous(), rows, weights, plan, want_rows)
    return [empty if grad is None else grad for grad, empty in zip(gradients, defaults)]


@unpermute_backward_op.fake
def _(
    dy: Tensor,
    rows: Tensor | None,
    topk_weights: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    top_k: int,
    want_rows: bool,
) -> list[Tensor]:
    drows = dy.new_empty(order.shape[0] if want_rows else 0, dy.shape[1])
    return [drows, dy.new_empty(0 if rows is None else dy.shape[0], top_k, dtype=torch.float32)]


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, inverse, offsets, ctx.top_k = inputs
    ctx.save_for_backward(order, inverse, offsets)


def _permute_backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    return unpermute_op(drows, None, *ctx.saved_tensors, ctx.top_k), None, None, None, None


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, order, inverse, offsets, ctx.top_k = inputs
    saved_rows = rows if ctx.needs_input_grad[1] else None  # only the weights' gradient needs rows
    ctx.save_for_backward(saved_rows, weights, order, inverse, offsets)


def _unpermute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("cuda")
    rows, weights, *plan = ctx.saved_tensors
    want_rows, want_weights = ctx.needs_input_grad[:2]
    drows, dweights = unpermute_backward_op(dy, rows, weights, *plan, ctx.top_k, want_rows)
    return (
        drows if want_rows else None,
        dweights if want_weights else None,
        None,
        None,
        None,
        None,
    )


permute_op.differentiable(_permute_backward, _save_plan)
unpermute_op.differentiable(_unpermute_backward, _save_rows)
