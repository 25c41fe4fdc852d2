"""Experts with low-rank adapters, as one operator: beside each frozen matmul a low-rank one.

The equations are those of the `torch` kernel, with W x + s B (A x) in place of W x. The forward
pass saves x and the pre-activation only. The backward pass computes no gradient of a frozen
weight. Grouped matmuls over sorted rows do all of it, the low-rank ones too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.activations import activate, activate_with_pullback
from tokenyard.adapter import LoraAdapter
from tokenyard.experts._grouped_matmuls import (
    add_bias,
    row_experts,
    rows_outer,
    rows_sum,
    rows_times,
)
from tokenyard.experts._weights import local_weight
from tokenyard.interfaces import ExpertWeights, Plan
from tokenyard.operators import operator, refuse_second_derivative
from tokenyard.permutations._moves import rows_to_slots, slots_to_rows, to_rows, to_tokens

_NAME = "tokenyard::lora_experts"
_TENSORS = (
    "x",
    "order",
    "inverse",
    "offsets",
    "topk_weights",
    "up",
    "down",
    "up_bias",
    "down_bias",
    "up_a",
    "up_b",
    "down_a",
    "down_b",
    "dropped",
    "mask",
)
_DIFFERENTIABLE = (0, *range(4, 14))  # positions in _TENSORS
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


class _Pair(NamedTuple):
    """A and B of one weight, for rows sorted by expert."""

    a: Tensor  # [E, rank, columns]
    b: Tensor  # [E, rows, rank]
    scale: float
    offsets: Tensor

    def low(self, rows: Tensor) -> Tensor:
        """Return s x A^T [R, rank] for x [R, columns]."""
        return rows_times(rows, self.a.mT, self.offsets) * self.scale

    def add(self, y: Tensor, rows: Tensor) -> None:
        """Add s (x A^T) B^T to y [R, rows] for x [R, columns]."""
        y += rows_times(self.low(rows), self.b.mT, self.offsets)

    def low_gradient(self, dy: Tensor) -> Tensor:
        """Return s dy B [R, rank] for dy [R, rows]."""
        return rows_times(dy, self.b, self.offsets) * self.scale


class _Call(NamedTuple):
    """The inputs of a forward pass, by name."""

    x: Tensor  # [T, D]
    plan: Plan
    topk_weights: Tensor | None  # [T, K]
    weights: ExpertWeights
    up: _Pair | None
    down: _Pair | None
    dropped: Tensor | None  # [T, D] x after dropout, the input of A of up; None: x
    mask: Tensor | None  # [R, F] factors of the activation before A of down; None: 1
    activation: str

    def masked(self, rows: Tensor) -> Tensor:
        return rows if self.mask is None else rows * self.mask


def _call(arguments: tuple[Any, ...]) -> _Call:
    """Return the inputs of the operator by name."""
    x, order, inverse, offsets, topk_weights = arguments[:5]
    up_a, up_b, down_a, down_b, dropped, mask, top_k, scale, activation = arguments[9:]
    return _Call(
        x,
        Plan(order, inverse, offsets, top_k),
        topk_weights,
        ExpertWeights(*arguments[5:9]),
        None if up_a is None else _Pair(up_a, up_b, scale, offsets),
        None if down_a is None else _Pair(down_a, down_b, scale, offsets),
        dropped,
        mask,
        activation,
    )


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return y [T, D] and the pre-activation z [R, 2F or F]."""
    call = _call(arguments)
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


def _backward(dy: Tensor, z: Tensor, needs: list[bool], *arguments: Any) -> list[Tensor]:
    """Return a gradient for each tensor of _DIFFERENTIABLE; an empty one if it is not needed."""
    wanted = {_TENSORS[i] for i, need in zip(_DIFFERENTIABLE, needs) if need}
    call = _call(arguments)
    gradients: dict[str, Tensor] = {}
    dz = _through_down(dy, z, call, wanted, gradients)
    _through_up(dz, call, wanted, gradients)
    empty = dy.new_empty(0)
    return [
        gradients[_TENSORS[i]] if need else empty.clone() for i, need in zip(_DIFFERENTIABLE, needs)
    ]


def _through_down(
    dy: Tensor, z: Tensor, call: _Call, wanted: set[str], gradients: dict[str, Tensor]
) -> Tensor:
    """Return dz [R, 2F or F]; add the gradients of the down projection and of topk_weights."""
    _, plan, topk_weights, (_, down, _, down_bias), _, pair, *_ = call
    offsets = plan.offsets
    a, pullback = activate_with_pullback(z, call.activation)  # [R, F]
    drows = to_rows(dy.contiguous(), plan)  # [R, D], not multiplied by topk_weights
    row_weights = None if topk_weights is None else slots_to_rows(topk_weights, plan)  # [R, 1]
    da = rows_times(drows, down, offsets)  # [R, F], not multiplied by topk_weights
    if pair is not None:
        dlow = pair.low_gradient(drows)  # [R, rank], not multiplied by topk_weights
        da += call.masked(rows_times(dlow, pair.a, offsets))
        if "down_a" in wanted:
            dlow = _weighted(dlow, row_weights)
            gradients["down_a"] = rows_outer(dlow, call.masked(a), offsets)
        if "down_b" in wanted:
            low = _weighted(pair.low(call.masked(a)), row_weights)
            gradients["down_b"] = rows_outer(drows, low, offsets)
    if "topk_weights" in wanted and topk_weights is not None:
        dots = (da.to(topk_weights.dtype) * a).sum(1, keepdim=True)
        if down_bias is not None:
            biases = down_bias[row_experts(drows, offsets)]
            dots += (drows.to(topk_weights.dtype) * biases).sum(1, keepdim=True)
        gradients["topk_weights"] = rows_to_slots(dots, plan).squeeze(-1)
    if "down" in wanted:
        gradients["down"] = rows_outer(drows, _weighted(a, row_weights), offsets)
    if "down_bias" in wanted:
        gradients["down_bias"] = rows_sum(_weighted(drows, row_weights), offsets)
    return pullback(_weighted(da, row_weights))


def _through_up(dz: Tensor, call: _Call, wanted: set[str], gradients: dict[str, Tensor]) -> None:
    """Add the gradients of the up projection, of x, and of x after dropout."""
    x, plan, _, weights, pair, *_ = call
    offsets = plan.offsets
    dx_rows = rows_times(dz, weights.up, offsets) if "x" in wanted else None  # [R, D]
    if pair is not None:
        dlow = pair.low_gradient(dz)  # [R, rank]
        if wanted & {"up_a", "up_b"}:
            a_rows = to_rows(x if call.dropped is None else call.dropped, plan)  # [R, D]
            gradients["up_a"] = rows_outer(dlow, a_rows, offsets)
            gradients["up_b"] = rows_outer(dz, pair.low(a_rows), offsets)
            del a_rows
        if "dropped" in wanted:
            gradients["dropped"] = to_tokens(rows_times(dlow, pair.a, offsets), plan, None)
        elif dx_rows is not None and call.dropped is None:
            dx_rows += rows_times(dlow, pair.a, offsets)
    if dx_rows is not None:
        gradients["x"] = to_tokens(dx_rows, plan, None)
    if "up" in wanted:
        gradients["up"] = rows_outer(dz, to_rows(x, plan), offsets)
    if "up_bias" in wanted:
        gradients["up_bias"] = rows_sum(dz, offsets)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else (rows * weights).to(rows.dtype)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _call(arguments)
    shape = (call.plan.order.shape[0], call.weights.up.shape[1])
    return torch.empty_like(call.x), call.x.new_empty(shape)


def _fake_backward(dy: Tensor, z: Tensor, needs: list[bool], *arguments: Any) -> list[Tensor]:
    likes = [arguments[i] for i in _DIFFERENTIABLE]
    return [
        like.new_empty(like.shape) if need else dy.new_empty(0) for like, need in zip(likes, needs)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(_TENSORS)], output[1])
    ctx.constants = inputs[len(_TENSORS) :]


def _differentiate(ctx: Any, dy: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(_NAME, "loop")
    result: list[Tensor | None] = [None] * (len(_TENSORS) + len(ctx.constants))
    if dy is None:
        return tuple(result)
    *inputs, z = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    gradients = _lora_experts_backward(dy, z, needs, *inputs, *ctx.constants)
    for position, gradient, need in zip(_DIFFERENTIABLE, gradients, needs):
        result[position] = gradient if need else None
    return tuple(result)


_lora_experts = operator(_NAME, f"({_SCHEMA}) -> (Tensor, Tensor)", kept=True)(_forward)
torch.library.register_fake(_lora_experts, _fake)
_lora_experts_backward = operator(
    f"{_NAME}_backward", f"(Tensor dy, Tensor z, bool[] needs, {_SCHEMA}) -> Tensor[]"
)(_backward)
torch.library.register_fake(_lora_experts_backward, _fake_backward)
torch.library.register_autograd(_lora_experts, _differentiate, setup_context=_save)
