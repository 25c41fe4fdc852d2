"""The `torch` kernel: one custom op in plain torch, with its gradient written out, on any device and dtype.

For the backward pass it saves x and the pre-activation only. With dY the gradient of a token, w its weight for an
expert, A the expert's activation: dA' = dY W_down, so dw = <dA', A>, dA = w dA', and dW_down = dY^T (w A). The expert's
output is thus never saved (the identity is SonicMoE's, arXiv 2512.14080).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import activate, activate_with_pullback
from tokenyard.experts._products import add_bias, row_experts, rows_outer, rows_sum, rows_times
from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.permutations._moves import rows_to_slots, slots_to_rows, to_rows, to_tokens
from tokenyard.workload import Workload


class TorchExperts:
    """Computes experts by grouped products in plain torch; once differentiable."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.activation = workload.activation

    def __call__(self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        y, _ = experts_op(x, *plan[:3], topk_weights, *weights, plan.top_k, self.activation)
        return y


@torch.library.custom_op("tokenyard::experts", mutates_args=())
def experts_op(
    x: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    top_k: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return y [T, D] and the pre-activation z [R, 2F or F]."""
    plan = Plan(order, inverse, offsets, top_k)
    z = add_bias(rows_times(to_rows(x, plan), up.mT, offsets), up_bias, offsets)
    rows = add_bias(rows_times(activate(z, activation), down.mT, offsets), down_bias, offsets)
    return to_tokens(rows, plan, topk_weights), z


@experts_op.register_fake
def _(
    x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor | None, up: Tensor, *rest: Any
) -> Any:
    return x.new_empty(x.shape), x.new_empty(order.shape[0], up.shape[1])


@torch.library.custom_op("tokenyard::experts_backward", mutates_args=())
def experts_backward_op(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    top_k: int,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, topk_weights, up, down, up_bias and down_bias; an empty one where none is needed."""
    plan = Plan(order, inverse, offsets, top_k)
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    empty = dy.new_empty(0)
    grads = [empty] * 6
    a, pullback = activate_with_pullback(z, activation)
    drows = to_rows(dy, plan)  # unweighted
    row_weights = None if topk_weights is None else slots_to_rows(topk_weights, plan)
    da = rows_times(drows, down, offsets)
    if need_weights and topk_weights is not None:
        grads[1] = _gate_gradient(da, a, drows, down_bias, plan, topk_weights.dtype)
    if need_down:
        grads[3] = rows_outer(drows, _weighted(a, row_weights), offsets)
    if need_down_bias:
        grads[5] = rows_sum(_weighted(drows, row_weights), offsets)
    dz = pullback(_weighted(da, row_weights))
    if need_up:
        grads[2] = rows_outer(dz, to_rows(x, plan), offsets)
    if need_up_bias:
        grads[4] = rows_sum(dz, offsets)
    if need_x:
        grads[0] = to_tokens(rows_times(dz, up, offsets), plan, None)
    return [grad if grad is not empty else dy.new_empty(0) for grad in grads]


@experts_backward_op.register_fake
def fake_gradients(dy: Tensor, x: Tensor, z: Tensor, *rest: Any) -> list[Tensor]:
    """Return what the backward op returns, by shape."""
    _, _, _, topk_weights, up, down, _, _, _, needs = rest
    likes = (
        x,
        x if topk_weights is None else topk_weights,
        up,
        down,
        up.new_empty(up.shape[:2]),
        down.new_empty(down.shape[:2]),
    )
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else t.new_empty(0)
        for t, n in zip(likes, needs)
    ]


def _gate_gradient(
    da: Tensor, a: Tensor, drows: Tensor, down_bias: Tensor | None, plan: Plan, dtype: torch.dtype
) -> Tensor:
    """Return [T, K]: <dA', A> for each slot, and <dY, bias> where there is a bias."""
    dots = (da.to(dtype) * a).sum(1, keepdim=True)
    if down_bias is not None:
        dots += (drows.to(dtype) * down_bias[row_experts(drows, plan.offsets)]).sum(1, keepdim=True)
    return rows_to_slots(dots, plan).squeeze(-1)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else (rows * weights).to(rows.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, order, inverse, offsets, topk_weights, up, down, _, down_bias, top_k, activation = inputs
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)  # or z, which nothing else reads, gets a gradient of zeros, written out
    ctx.save_for_backward(x, z, order, inverse, offsets, topk_weights, up, down, down_bias)
    ctx.top_k, ctx.activation = top_k, activation


def _backward(ctx: Any, dy: Tensor, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad
    needs = [need[i] for i in (0, 4, 5, 6, 7, 8)]
    grads = experts_backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.top_k, ctx.activation, needs)
    dx, dweights, dup, ddown, dup_bias, ddown_bias = (g if n else None for g, n in zip(grads, needs))
    return dx, None, None, None, dweights, dup, ddown, dup_bias, ddown_bias, None, None


experts_op.register_autograd(_backward, setup_context=_setup_context)
