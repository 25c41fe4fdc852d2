"""Selection and weights of the top-k router as custom operators."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard.operators import operator, refuse_second_derivative
from tokenyard.workload import RoutingRule
from tokenyard_kernels_cuda.ops._sizes import WARP, ceil_div, fitting_warps
from tokenyard_kernels_cuda.toolchain import Array, Float, Int, Kernel, Parameters, Source

_WARPS = 8  # warps per block, one per token; fewer if they need too much shared memory
_SCORES = {"softmax": 0, "sigmoid": 1}
_SOFTMAX_OF_SELECTED = 2

MOST_EXPERTS = 1024
"""Limit of the kernels: a lane of a warp holds every 32nd expert, at most 32 of them."""


class RouteKernels(NamedTuple):
    """The kernels for one bound on the number of experts."""

    route: Kernel
    backward: Kernel


class _Rule(NamedTuple):
    """A routing rule as kernel arguments, in the kernels' order."""

    score: int
    power: float  # 0: no normalisation
    scale: float
    groups: int = 1
    groups_kept: int = 1
    by_two: int = 0


@cache
def route_kernels(experts: int) -> RouteKernels:
    """Return the kernels for up to `experts` experts, rounded up to 32 times a power of two."""
    lane_experts = 1 << (ceil_div(experts, WARP) - 1).bit_length()
    source = Source("route.cu", (("LANE_EXPERTS", str(lane_experts)),))
    floats = Array(torch.float32)
    ints = Array(torch.int32)
    optional_ints = Array(torch.int32, optional=True)
    sizes: Parameters = {"tokens": Int(), "experts": Int(), "top_k": Int()}
    weighting: Parameters = {"score": Int(), "power": Float(), "scale": Float()}
    route = Kernel(
        source,
        "route",
        logits=floats,
        bias=Array(torch.float32, optional=True),
        fixed_ids=optional_ints,
        ids=optional_ints,
        weights=floats,
        **sizes,
        **weighting,
        groups=Int(),
        groups_kept=Int(),
        by_two=Int(),
    )
    backward = Kernel(
        source,
        "route_backward",
        dweights=floats,
        logits=Array(torch.float32, optional=True),
        weights=Array(torch.float32, optional=True),
        ids=ints,
        dlogits=floats,
        **sizes,
        **weighting,
    )
    return RouteKernels(route, backward)


@operator("tokenyard_cuda::route", kept=True)
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
    """Select the K experts of the highest scores; return ids [T, K] int32 and weights [T, K].

    The scores are those of logits [T, E], plus bias [E] unless None. Of equal scores the lowest id
    comes first.
    """
    tokens = logits.shape[0]
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    weights = logits.new_empty(tokens, top_k)
    if tokens:
        rule = _Rule(score, power, scale, groups, groups_kept, int(by_two))
        _route(logits, bias, None, ids, weights, rule)
    return ids, weights


@route_op.fake
def _(logits: Tensor, bias: Tensor | None, top_k: int, *rule: Any) -> tuple[Tensor, Tensor]:
    ids = logits.new_empty(logits.shape[0], top_k, dtype=torch.int32)
    return ids, logits.new_empty(logits.shape[0], top_k)


@operator("tokenyard_cuda::weigh")
def weigh_op(logits: Tensor, ids: Tensor, score: int, power: float, scale: float) -> Tensor:
    """Return the weights [T, K] float32 of ids [T, K] int32 from logits [T, E]; 0 if dropped."""
    weights = logits.new_empty(ids.shape)
    if ids.shape[0]:
        _route(logits, None, ids.contiguous(), None, weights, _Rule(score, power, scale))
    return weights


@weigh_op.fake
def _(logits: Tensor, ids: Tensor, *rule: Any) -> Tensor:
    return logits.new_empty(ids.shape)


def _route(
    logits: Tensor,
    bias: Tensor | None,
    fixed_ids: Tensor | None,
    ids: Tensor | None,
    weights: Tensor,
    rule: _Rule,
) -> None:
    """Launch the kernel, which writes `weights` and, unless None, `ids`."""
    tokens, experts = logits.shape
    top_k = weights.shape[1]
    words = rule.groups + 2 * top_k
    warps = fitting_warps(_WARPS, words)
    route_kernels(experts).route(
        (ceil_div(tokens, warps), 1),
        warps * WARP,
        logits.contiguous(),
        bias,
        fixed_ids,
        ids,
        weights,
        tokens,
        experts,
        top_k,
        *rule,
        shared=4 * warps * words,
    )


@operator("tokenyard_cuda::weights_backward")
def weights_backward_op(
    dweights: Tensor, logits: Tensor, ids: Tensor, score: int, power: float, scale: float
) -> Tensor:
    """Return the gradient of logits [T, E] from dweights [T, K] and ids [T, K]."""
    dlogits = logits.new_empty(logits.shape)
    _backward(dweights, logits.contiguous(), None, ids, dlogits, (score, power, scale))
    return dlogits


def softmax_backward(
    dweights: Tensor, weights: Tensor, ids: Tensor, experts: int, scale: float
) -> Tensor:
    """Return what `weights_backward_op` does, from weights [T, K] that `are_softmax`."""
    dlogits = weights.new_empty(weights.shape[0], experts)
    _backward(dweights, None, weights, ids, dlogits, (_SOFTMAX_OF_SELECTED, 0.0, scale))
    return dlogits


def are_softmax(score: int, power: float, scale: float) -> bool:
    """Return whether weights are a softmax over the selected logits, times a scale."""
    of_selected = score == _SOFTMAX_OF_SELECTED and power == 0
    normalized = score in (_SOFTMAX_OF_SELECTED, _SCORES["softmax"]) and power == 1
    return (of_selected or normalized) and scale != 0


def _backward(
    dweights: Tensor,
    logits: Tensor | None,
    weights: Tensor | None,
    ids: Tensor,
    dlogits: Tensor,
    weighting: tuple[int, float, float],
) -> None:
    """Launch the kernel, which writes `dlogits`, from logits or from weights."""
    tokens, experts = dlogits.shape
    if not tokens:
        return
    top_k = ids.shape[1]
    words = 3 * top_k
    warps = fitting_warps(_WARPS, words)
    route_kernels(experts).backward(
        (ceil_div(tokens, warps), 1),
        warps * WARP,
        dweights.contiguous(),
        logits,
        weights,
        ids.contiguous(),
        dlogits,
        tokens,
        experts,
        top_k,
        *weighting,
        shared=4 * warps * words,
    )


@weights_backward_op.fake
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


route_op.differentiable(_route_backward, _save_route)
weigh_op.differentiable(_weigh_backward, _save_weigh)


def route(
    logits: Tensor, bias: Tensor | None, top_k: int, rule: RoutingRule
) -> tuple[Tensor, Tensor]:
    """Select K experts per token by a rule; return ids [T, K] and differentiable weights [T, K]."""
    ids, weights = route_op(logits, *rule_arguments(bias, top_k, rule))
    return ids, weights


def rule_arguments(bias: Tensor | None, top_k: int, rule: RoutingRule) -> tuple[Any, ...]:
    """Return the arguments of `route_op` after the logits."""
    bias = None if bias is None else bias.float().contiguous()
    by_two = rule.group_score == "top2"
    return bias, top_k, *_weighting(rule), rule.num_groups, rule.groups_kept, by_two


def weigh(logits: Tensor, ids: Tensor, rule: RoutingRule) -> Tensor:
    """Return the weights [T, K] of ids [T, K], differentiable in logits [T, E].

    Raises ValueError if ids do not have one row per token.
    """
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        shape = list(ids.shape)
        raise ValueError(
            f"topk_ids is {shape}, and there are {logits.shape[0]} tokens; give ids [T, K]"
        )
    weights: Tensor = weigh_op(logits, ids.int(), *_weighting(rule))
    return weights


def _weighting(rule: RoutingRule) -> tuple[int, float, float]:
    """Return score, power and scale as the kernels take them."""
    score = _SOFTMAX_OF_SELECTED if rule.select_first else _SCORES[rule.score]
    return score, rule.normalize or 0.0, rule.scale
