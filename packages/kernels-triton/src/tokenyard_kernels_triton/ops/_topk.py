"""Selection and weights of the top-k router as custom operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard.workload import RoutingRule
from tokenyard_kernels_triton._device import ceil_div, on_device_of, power_of_two
from tokenyard_kernels_triton.kernels import _topk
from tokenyard_kernels_triton.launching import launch

_ENTRIES = 4096  # of [T, E], held by one program


@operator("tokenyard_triton::select_experts", kept=True)
def select_op(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    sigmoid: bool,
    select_first: bool,
    num_groups: int,
    groups_kept: int,
    top_two: bool,
) -> Tensor:
    """Return ids [T, K] int32 of the highest scores of logits [T, E], best first.

    Equal scores come with the lowest id first.
    """
    tokens, experts = logits.shape
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    if tokens:
        with on_device_of(logits):
            launch(_topk.select_experts, _grid(tokens, experts))(
                logits.contiguous(),
                bias,
                ids,
                tokens,
                experts,
                top_k,
                experts // num_groups,
                num_groups,
                groups_kept,
                SIGMOID=sigmoid,
                SELECT_FIRST=select_first,
                BIAS=bias is not None,
                GROUPS=groups_kept < num_groups,
                TOP_TWO=top_two,
                **_block(experts),
            )
    return ids


@select_op.fake
def _(logits: Tensor, bias: Tensor | None, top_k: int, *rule: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], top_k, dtype=torch.int32)


@operator("tokenyard_triton::weigh_experts")
def weigh_op(
    logits: Tensor,
    ids: Tensor,
    sigmoid: bool,
    select_first: bool,
    normalize: float | None,
    scale: float,
) -> Tensor:
    """Return the weights [T, K] float32 of selected ids [T, K] from logits [T, E]; 0 if dropped."""
    weights = logits.new_empty(ids.shape)
    if ids.shape[0]:
        with on_device_of(logits):
            launch(_topk.weigh_experts, _grid(*logits.shape))(
                logits.contiguous(),
                ids.contiguous(),
                weights,
                *logits.shape,
                ids.shape[1],
                normalize or 0.0,
                scale,
                **_rule(sigmoid, select_first, normalize, ids.shape[1]),
                **_block(logits.shape[1]),
            )
    return weights


@weigh_op.fake
def _(logits: Tensor, ids: Tensor, *rule: Any) -> Tensor:
    return logits.new_empty(ids.shape)


@operator("tokenyard_triton::weigh_experts_backward")
def weigh_backward_op(
    dweights: Tensor,
    logits: Tensor,
    ids: Tensor,
    sigmoid: bool,
    select_first: bool,
    normalize: float | None,
    scale: float,
) -> Tensor:
    """Return the gradient of logits [T, E]."""
    dlogits = logits.new_empty(logits.shape)
    if ids.shape[0]:
        with on_device_of(logits):
            launch(_topk.weigh_experts_backward, _grid(*logits.shape))(
                dweights.contiguous(),
                logits.contiguous(),
                ids.contiguous(),
                dlogits,
                *logits.shape,
                ids.shape[1],
                normalize or 0.0,
                scale,
                **_rule(sigmoid, select_first, normalize, ids.shape[1]),
                **_block(logits.shape[1]),
            )
    return dlogits


@weigh_backward_op.fake
def _(dweights: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _rule(sigmoid: bool, select_first: bool, normalize: float | None, top_k: int) -> dict[str, Any]:
    return {
        "SIGMOID": sigmoid,
        "SELECT_FIRST": select_first,
        "POWER": int(normalize) if normalize in (1, 2) else 0,
        "NORMALIZE": normalize is not None,
        "TOP_K": power_of_two(top_k),
    }


def _block(experts: int) -> dict[str, int]:
    width = power_of_two(experts)
    return {"TOKENS": max(1, _ENTRIES // width), "EXPERTS": width}


def _grid(tokens: int, experts: int) -> tuple[int]:
    return (ceil_div(tokens, _block(experts)["TOKENS"]),)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ids, *ctx.rule = inputs
    ctx.save_for_backward(logits, ids)


def _backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("triton")
    return weigh_backward_op(dweights, *ctx.saved_tensors, *ctx.rule), None, None, None, None, None


weigh_op.differentiable(_backward, _save)


def select(logits: Tensor, bias: Tensor | None, top_k: int, rule: RoutingRule) -> Tensor:
    """Return the ids [T, K] that a rule selects from logits [T, E]."""
    groups = (rule.num_groups, rule.groups_kept, rule.group_score == "top2")
    return select_op(
        logits.detach(), bias, top_k, rule.score == "sigmoid", rule.select_first, *groups
    )


def weigh(logits: Tensor, ids: Tensor, rule: RoutingRule) -> Tensor:
    """Return the weights [T, K] of selected ids, differentiable in the logits."""
    return weigh_op(logits, ids, *_weighing(rule))


def weigh_gradient(dweights: Tensor, logits: Tensor, ids: Tensor, rule: RoutingRule) -> Tensor:
    """Return the gradient of the logits [T, E] from that of the weights [T, K]."""
    return weigh_backward_op(dweights, logits, ids, *_weighing(rule))


def _weighing(rule: RoutingRule) -> tuple[bool, bool, float | None, float]:
    return rule.score == "sigmoid", rule.select_first, rule.normalize, rule.scale
