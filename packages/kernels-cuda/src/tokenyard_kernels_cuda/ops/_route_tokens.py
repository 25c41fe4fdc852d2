"""Logits, selection and weights of tokens as one custom operator, so autograd has one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard.workload import RoutingRule
from tokenyard_kernels_cuda.ops._logits import logits_backward_op, logits_op
from tokenyard_kernels_cuda.ops._topk import (
    are_softmax,
    route_op,
    rule_arguments,
    softmax_backward,
    weights_backward_op,
)


@operator("tokenyard_cuda::route_tokens", kept=True)
def route_tokens_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: int,
    power: float,
    scale: float,
    groups: int,
    groups_kept: int,
    by_two: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [T, K] int32, weights [T, K] and logits [T, E] of x [T, D] and weight [E, D].

    The rule is that of `route_op`.
    """
    logits = logits_op.compute(x, weight)
    rule = (top_k, score, power, scale, groups, groups_kept, by_two)
    ids, weights = route_op.compute(logits, bias, *rule)
    return ids, weights, logits


@route_tokens_op.fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, *rule: Any
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    ids = x.new_empty(tokens, top_k, dtype=torch.int32)
    weights = x.new_empty(tokens, top_k, dtype=torch.float32)
    return ids, weights, x.new_empty(tokens, weight.shape[0], dtype=torch.float32)


@operator("tokenyard_cuda::route_tokens_backward")
def route_tokens_backward_op(
    dweights: Tensor | None,
    dlogits: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    ids: Tensor,
    needs: list[bool],
    score: int,
    power: float,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of x and weight; an empty one if not needed. One of both is given.

    `saved` are weights [T, K] that `are_softmax`, else logits [T, E].
    """
    total = dlogits
    if dweights is not None:
        if are_softmax(score, power, scale):
            total = softmax_backward(dweights, saved, ids, weight.shape[0], scale)
        else:
            total = weights_backward_op.compute(dweights, saved, ids, score, power, scale)
        total = total if dlogits is None else total + dlogits
    gradients: list[Tensor] = logits_backward_op.compute(total, x, weight, needs)
    return gradients


@route_tokens_backward_op.fake
def _(
    dweights: Tensor | None,
    dlogits: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    ids: Tensor,
    needs: list[bool],
    *rule: Any,
) -> list[Tensor]:
    return [t.new_empty(t.shape if need else 0) for t, need in zip((x, weight), needs)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, *rule = inputs
    ids, weights, logits = output
    ctx.rule = rule[:3]
    ctx.mark_non_differentiable(ids)
    ctx.set_materialize_grads(False)  # logits without a loss of their own have no gradient
    saved = weights if are_softmax(*ctx.rule) else logits  # the experts save weights as well
    ctx.save_for_backward(x, weight, saved, ids)


def _backward(
    ctx: Any, _: Any, dweights: Tensor | None, dlogits: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("cuda")
    needs = list(ctx.needs_input_grad[:2])
    gradients: list[Tensor | None] = [None, None]
    if dweights is not None or dlogits is not None:
        tensors = ctx.saved_tensors
        results = route_tokens_backward_op(dweights, dlogits, *tensors, needs, *ctx.rule)
        gradients = [result if need else None for result, need in zip(results, needs)]
    return *gradients, *(None,) * 8


route_tokens_op.differentiable(_backward, _save)


def route_tokens(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, rule: RoutingRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [T, K], weights [T, K] and logits [T, E], differentiable in x and weight."""
    bias, *rest = rule_arguments(bias, top_k, rule)
    ids, weights, logits = route_tokens_op(x, weight, bias, *rest)
    return ids, weights, logits
