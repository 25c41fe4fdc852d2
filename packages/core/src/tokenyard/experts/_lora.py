"""Experts with low-rank adapters, as one operator: beside each frozen matmul a low-rank one.

The equations are those of the `torch` kernel, with W x + s B (A x) in place of W x. The forward
pass saves x and the pre-activation only. The backward pass computes no gradient of a frozen
weight. Grouped matmuls over sorted rows do all of it, the low-rank ones too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.activations import activate
from tokenyard.adapter import LoraAdapter
from tokenyard.experts._grouped_matmuls import add_bias, rows_times
from tokenyard.experts._lora_backward import DIFFERENTIABLE, TENSORS, backward
from tokenyard.experts._lora_call import lora_call
from tokenyard.experts._weights import local_weight
from tokenyard.interfaces import ExpertWeights, Plan
from tokenyard.operators import operator, refuse_second_derivative
from tokenyard.permutations._moves import to_rows, to_tokens

_NAME = "tokenyard::lora_experts"
_SCHEMA = (
    "Tensor x, Tensor order, Tensor inverse, Tensor offsets, Tensor? topk_weights, Tensor up, "
    "Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor? up_a, Tensor? up_b, Tensor? down_a, "
    "Tensor? down_b, Tensor? dropped, Tensor? mask, int top_k, float scale, str activation"
)
_ALIGNED = 8  # grouped matmuls of bfloat16 on a GPU take ranks that are multiples of this


def lora_experts(
    x: Tensor,
    plan: Plan,
    topk_weights: Tensor | None,
    weights: ExpertWeights,
    adapter: LoraAdapter,
    activation: str,
) -> Tensor:
    """Return y [T, D] for unsorted tokens x [T, D]: experts with their adapters."""
    matrices: dict[str, Tensor | None] = dict.fromkeys(("up_a", "up_b", "down_a", "down_b"))
    for target in adapter.targets:
        a, b = (local_weight(matrix, x.dtype) for matrix in adapter.matrices(target))
        padding = -a.shape[1] % _ALIGNED if a.is_cuda else 0
        matrices[f"{target}_a"] = F.pad(a, (0, 0, 0, padding)) if padding else a
        matrices[f"{target}_b"] = F.pad(b, (0, padding)) if padding else b
    dropped: Tensor | None = None  # [T, D]
    mask: Tensor | None = None  # [R, F]
    if adapter.training and adapter.settings.dropout:
        if matrices["up_a"] is not None:
            dropped = adapter.dropped(x)
        if matrices["down_a"] is not None:
            mask = adapter.dropped(x.new_ones(plan.order.shape[0], weights.down.shape[2]))
    order, inverse, offsets, top_k = plan
    y: Tensor = _lora_experts(
        x,
        order,
        inverse,
        offsets,
        topk_weights,
        *weights,
        *matrices.values(),
        dropped,
        mask,
        top_k,
        adapter.scale,
        activation,
    )[0]
    return y


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return y [T, D] and the pre-activation z [R, 2F or F]."""
    call = lora_call(arguments)
    plan = call.plan
    up, down, up_bias, down_bias = call.weights
    x_rows = to_rows(call.x, plan)  # [R, D]
    z = add_bias(rows_times(x_rows, up.mT, plan.offsets), up_bias, plan.offsets)  # [R, 2F or F]
    if call.up is not None:
        call.up.add(z, x_rows if call.dropped is None else to_rows(call.dropped, plan))
    del x_rows  # free them before the next allocation
    a = activate(z, call.activation)  # [R, F]
    rows = add_bias(rows_times(a, down.mT, plan.offsets), down_bias, plan.offsets)  # [R, D]
    if call.down is not None:
        call.down.add(rows, call.masked(a))
    return to_tokens(rows, plan, call.topk_weights), z


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = lora_call(arguments)
    shape = (call.plan.order.shape[0], call.weights.up.shape[1])
    return torch.empty_like(call.x), call.x.new_empty(shape)


def _fake_backward(dy: Tensor, z: Tensor, needs: list[bool], *arguments: Any) -> list[Tensor]:
    likes = [arguments[i] for i in DIFFERENTIABLE]
    return [
        like.new_empty(like.shape) if need else dy.new_empty(0) for like, need in zip(likes, needs)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(TENSORS)], output[1])
    ctx.constants = inputs[len(TENSORS) :]


def _differentiate(ctx: Any, dy: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(_NAME, "loop")
    result: list[Tensor | None] = [None] * (len(TENSORS) + len(ctx.constants))
    if dy is None:
        return tuple(result)
    *inputs, z = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
    gradients = _lora_experts_backward(dy, z, needs, *inputs, *ctx.constants)
    for position, gradient, need in zip(DIFFERENTIABLE, gradients, needs):
        result[position] = gradient if need else None
    return tuple(result)


_lora_experts = operator(_NAME, f"({_SCHEMA}) -> (Tensor, Tensor)", kept=True)(_forward)
_lora_experts.fake(_fake)
_lora_experts_backward = operator(
    f"{_NAME}_backward", f"(Tensor dy, Tensor z, bool[] needs, {_SCHEMA}) -> Tensor[]"
)(backward)
_lora_experts_backward.fake(_fake_backward)
_lora_experts.differentiable(_differentiate, _save)
