"""Selection and weights of the top-k router as custom ops."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard.workload import RoutingRule
from tokenyard_kernels_cuda.ops._sizes import WARP, ceil_div, fitting_warps
from tokenyard_kernels_cuda.toolchain import Array, Float, Int, Kernel, Parameters, Source

_WARPS = 8  # of a block, each with a token, unless they need too much shared memory
_SCORES = {"softmax": 0, "sigmoid": 1}
_OF_SELECTED = 2

MOST_EXPERTS = 1024
"""Each lane of a warp holds every 32nd."""


class Routes(NamedTuple):
    """The kernels for tokens that choose from up to so many experts."""

    route: Kernel
    backward: Kernel


@cache
def routes(experts: int) -> Routes:
    """Return the kernels for so many experts: those for the next power of two times 32."""
    lane_experts = 1 << (ceil_div(experts, WARP) - 1).bit_length()
    source = Source("route.cu", (("LANE_EXPERTS", str(lane_experts)),))
    floats, floats_or_not = Array(torch.float32), Array(torch.float32, optional=True)
    ints, ints_or_not, number = Array(torch.int32), Array(torch.int32, optional=True), Int()
    sizes: Parameters = {"tokens": number, "experts": number, "top_k": number}
    rule: Parameters = {"score": number, "power": Float(), "scale": Float()}
    groups: Parameters = {"groups": number, "groups_kept": number, "by_two": number}
    given: Parameters = {"logits": floats, "bias": floats_or_not, "fixed_ids": ints_or_not}
    return Routes(
        Kernel(
            source, "route", **given, ids=ints_or_not, weights=floats, **sizes, **rule, **groups
        ),
        Kernel(
            source,
            "route_backward",
            dweights=floats,
            logits=floats,
            ids=ints,
            dlogits=floats,
            **sizes,
            **rule,
        ),
    )


@operator("tokenyard_cuda::route")
def route_op(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: int,
    power: float,
    scale: float,
    groups: int,
    groups_kept: int,
    by_two: bool,
) -> tuple[Tensor, Tensor]:
    """Return ids [T, K] int32 of the highest scores of logits [T, E], equal ones lowest id first, and their weights."""
    tokens = logits.shape[0]
    ids, weights = (
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(tokens, top_k),
    )
    if tokens:
        rule = (score, power, scale, groups, groups_kept, int(by_two))
        _route(logits, bias, None, ids, weights, *rule)
    return ids, weights


@torch.library.register_fake(route_op)
def _(logits: Tensor, bias: Tensor | None, top_k: int, *rule: Any) -> tuple[Tensor, Tensor]:
    ids = logits.new_empty(logits.shape[0], top_k, dtype=torch.int32)
    return ids, logits.new_empty(logits.shape[0], top_k)


@operator("tokenyard_cuda::weigh")
def weigh_op(logits: Tensor, ids: Tensor, score: int, power: float, scale: float) -> Tensor:
    """Return the weights [T, K] float32 of given ids [T, K] int32, by logits [T, E]; a dropped one weighs 0."""
    weights = logits.new_empty(ids.shape)
    if ids.shape[0]:
        _route(logits, None, ids.contiguous(), None, weights, score, power, scale, 1, 1, 0)
    return weights


@torch.library.register_fake(weigh_op)
def _(logits: Tensor, ids: Tensor, *rule: Any) -> Tensor:
    return logits.new_empty(ids.shape)


def _route(
    logits: Tensor, bias: Tensor | None, given: Tensor | None, ids: Tensor | None, *rest: Any
) -> None:
    weights, *rule = rest
    tokens, experts = logits.shape
    top_k, groups = weights.shape[1], rule[3]
    arguments = (logits.contiguous(), bias, given, ids, weights, tokens, experts, top_k, *rule)
    words = groups + 2 * top_k
    warps = fitting_warps(_WARPS, words)
    routes(experts).route(
        (ceil_div(tokens, warps), 1), warps * WARP, *arguments, shared=4 * warps * words
    )


@operator("tokenyard_cuda::weights_backward")
def weights_backward_op(
    dweights: Tensor, logits: Tensor, ids: Tensor, score: int, power: float, scale: float
) -> Tensor:
    """Return the gradient of logits [T, E]."""
    tokens, experts = logits.shape
    dlogits = logits.new_empty(tokens, experts)
    if tokens:
        top_k = ids.shape[1]
        tensors = (dweights.contiguous(), logits.contiguous(), ids.contiguous(), dlogits)
        arguments = (*tensors, tokens, experts, top_k, score, power, scale)
        words = 3 * top_k
        warps = fitting_warps(_WARPS, words)
        routes(experts).backward(
            (ceil_div(tokens, warps), 1), warps * WARP, *arguments, shared=4 * warps * words
        )
    return dlogits


@torch.library.register_fake(weights_backward_op)
def _(dweights: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, *rule = inputs
    ctx.rule = rule[:3]
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits, output[0])


def _route_backward(ctx: Any, _: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("cuda")
    return weights_backward_op(dweights, *ctx.saved_tensors, *ctx.rule), *(None,) * 8


def _save_weigh(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ids, *ctx.rule = inputs
    ctx.save_for_backward(logits, ids)


def _weigh_backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("cuda")
    return weights_backward_op(dweights, *ctx.saved_tensors, *ctx.rule), *(None,) * 4


torch.library.register_autograd(route_op, _route_backward, setup_context=_save_route)
torch.library.register_autograd(weigh_op, _weigh_backward, setup_context=_save_weigh)


def route(
    logits: Tensor, bias: Tensor | None, top_k: int, rule: RoutingRule
) -> tuple[Tensor, Tensor]:
    """Return the ids and weights [T, K] that a rule selects by logits [T, E]; weights are differentiable."""
    bias = None if bias is None else bias.float().contiguous()
    groups = (rule.num_groups, rule.groups_kept, rule.group_score == "top2")
    ids, weights = route_op(logits, bias, top_k, *_weighing(rule), *groups)
    return ids, weights


def weigh(logits: Tensor, ids: Tensor, rule: RoutingRule) -> Tensor:
    """Return the weights [T, K] of given ids, differentiable in logits."""
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(
            f"topk_ids is {list(ids.shape)}, and there are {logits.shape[0]} tokens; give ids [T, K]"
        )
    weights: Tensor = weigh_op(logits, ids.int(), *_weighing(rule))
    return weights


def _weighing(rule: RoutingRule) -> tuple[int, float, float]:
    return (
        _OF_SELECTED if rule.select_first else _SCORES[rule.score],
        rule.normalize or 0.0,
        rule.scale,
    )
