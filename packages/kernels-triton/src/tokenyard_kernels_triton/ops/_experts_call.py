"""The call of an expert layer: its tensors, sizes and alignment."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from tokenyard.experts import ExpertGradients, ExpertNeeds, ExpertsCall, LoraCall
from tokenyard.interfaces import ExpertWeights, GradientSums, Plan
from tokenyard_kernels_triton._device import may_round_float32
from tokenyard_kernels_triton.ops._alignment import aligned, contiguous

Call = TypeVar("Call", ExpertsCall, LoraCall)


def tensors_of(call: ExpertsCall) -> tuple[Tensor | None, ...]:
    """Return the tensors of a call in one order."""
    return call.x, *call.plan[:3], call.topk_weights, *call.weights


def with_tensors(call: ExpertsCall, tensors: tuple[Any, ...]) -> ExpertsCall:
    """Return the call with other tensors, in the order of `tensors_of`."""
    x, order, inverse, offsets, topk_weights, *weights = tensors
    plan = Plan(order, inverse, offsets, call.plan.top_k)
    return ExpertsCall(x, plan, topk_weights, ExpertWeights(*weights), call.activation)


def sizes_of(call: ExpertsCall) -> tuple[Any, ...]:
    """Return what determines the launches of a call besides its options."""
    weights = call.weights
    return (
        call.x.shape,
        call.plan.order.shape,
        call.plan.top_k,
        weights.up.shape,
        weights.down.shape,
        call.activation,
        may_round_float32(),
    )


def is_empty(call: ExpertsCall | LoraCall) -> bool:
    """Return whether a call has no row or no token, for which nothing is launched."""
    return call.plan.order.shape[0] == 0 or call.x.shape[0] == 0


def zero_gradients(call: ExpertsCall, needs: ExpertNeeds) -> ExpertGradients:
    """Return the gradients of an empty call."""
    up, down, _, _ = call.weights
    topk_weights = call.x if call.topk_weights is None else call.topk_weights
    likes = (call.x, topk_weights, up, down, up[..., 0], down[..., 0])
    return ExpertGradients(
        *(like.new_zeros(like.shape) if need else None for like, need in zip(likes, needs))
    )


def all_needs(call: ExpertsCall) -> ExpertNeeds:
    """Return the gradients of all tensors of a call."""
    return ExpertNeeds(
        x=True,
        topk_weights=call.topk_weights is not None,
        up=True,
        down=True,
        up_bias=call.weights.up_bias is not None,
        down_bias=call.weights.down_bias is not None,
    )


def needed(needs: ExpertNeeds, sums: GradientSums | None = None) -> list[str]:
    """Return the names of the gradients that are needed, and not added to sums."""
    added = () if sums is None else GradientSums._fields
    return [name for name, need in needs._asdict().items() if need and name not in added]


def aligned_call(call: Call) -> Call:
    """Return the call with tensors that the kernels can read.

    All of them are contiguous, and x, up and down are aligned to 16 bytes.
    """
    up, down, up_bias, down_bias = call.weights
    weights = ExpertWeights(aligned(up), aligned(down), contiguous(up_bias), contiguous(down_bias))
    return call._replace(
        x=aligned(call.x), topk_weights=contiguous(call.topk_weights), weights=weights
    )
