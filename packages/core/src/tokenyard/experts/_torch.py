"""The `torch` kernel: a custom op in plain torch with a manual backward, for any device and dtype.

The forward pass saves x and the pre-activation only. Let dY be the gradient of a token's output, w
its weight for an expert, and A the expert's activation. Then dA' = dY W_down, dw = <dA', A>,
dA = w dA', and dW_down = dY^T (w A). So the expert's output is not needed (SonicMoE, arXiv
2512.14080).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.activations import activate, activate_with_pullback
from tokenyard.experts._grouped_matmuls import (
    add_bias,
    row_experts,
    rows_outer,
    rows_sum,
    rows_times,
)
from tokenyard.experts._op import ExpertGradients, ExpertNeeds, ExpertsCall, register_experts_op
from tokenyard.interfaces import ExpertWeights, GradientSums, Permutation, Plan
from tokenyard.permutations._moves import rows_to_slots, slots_to_rows, to_rows, to_tokens
from tokenyard.workload import Workload


class TorchExperts:
    """Computes experts with grouped matmuls in plain torch; once differentiable."""

    adds_to_sums = True

    def __init__(self, workload: Workload, permutation: Permutation):
        self.activation = workload.activation

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return _experts(x, plan, topk_weights, weights, self.activation)

    def with_sums(
        self,
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        sums: GradientSums,
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]; gradients of weights are added to sums."""
        return _experts(x, plan, topk_weights, weights, self.activation, sums=sums)


def _forward(call: ExpertsCall) -> tuple[Tensor, Tensor]:
    """Return y [T, D] and the pre-activation z [R, 2F or F]."""
    plan = call.plan
    up, down, up_bias, down_bias = call.weights
    z = rows_times(to_rows(call.x, plan), up.mT, plan.offsets)  # [R, 2F or F]
    z = add_bias(z, up_bias, plan.offsets)
    rows = rows_times(activate(z, call.activation), down.mT, plan.offsets)  # [R, D]
    rows = add_bias(rows, down_bias, plan.offsets)
    return to_tokens(rows, plan, call.topk_weights), z


def _saved(call: ExpertsCall) -> tuple[Tensor]:
    return (call.x.new_empty(call.plan.order.shape[0], call.weights.up.shape[1]),)


def _backward(
    dy: Tensor,
    call: ExpertsCall,
    saved: list[Tensor],
    needs: ExpertNeeds,
    sums: GradientSums | None,
) -> ExpertGradients:
    x, plan, topk_weights, (up, down, _, down_bias), activation = call
    offsets = plan.offsets
    gradients: dict[str, Tensor] = {}
    a, pullback = activate_with_pullback(saved[0], activation)  # [R, F]
    drows = to_rows(dy.contiguous(), plan)  # [R, D], not multiplied by topk_weights
    row_weights = None if topk_weights is None else slots_to_rows(topk_weights, plan)  # [R, 1]
    da = rows_times(drows, down, offsets)  # [R, F], not multiplied by topk_weights
    if needs.topk_weights and topk_weights is not None:
        gradients["topk_weights"] = _gate_gradient(
            da, a, drows, down_bias, plan, topk_weights.dtype
        )
    if needs.down:
        gradients["down"] = rows_outer(drows, _weighted(a, row_weights), offsets)
    if needs.down_bias:
        gradients["down_bias"] = rows_sum(_weighted(drows, row_weights), offsets)
    dz = pullback(_weighted(da, row_weights))  # [R, 2F or F]
    if needs.up:
        gradients["up"] = rows_outer(dz, to_rows(x, plan), offsets)
    if needs.up_bias:
        gradients["up_bias"] = rows_sum(dz, offsets)
    if needs.x:
        gradients["x"] = to_tokens(rows_times(dz, up, offsets), plan, None)
    for name in ("up", "down"):
        if sums is not None and name in gradients:
            getattr(sums, name).add_(gradients.pop(name))
    return ExpertGradients(**gradients)


_experts = register_experts_op("tokenyard::experts", _forward, _backward, _saved, adds=True)


def _gate_gradient(
    da: Tensor, a: Tensor, drows: Tensor, down_bias: Tensor | None, plan: Plan, dtype: torch.dtype
) -> Tensor:
    """Return [T, K]: <dA', A> for each slot, plus <dY, bias> if there is a down bias."""
    dots = (da.to(dtype) * a).sum(1, keepdim=True)
    if down_bias is not None:
        dots += (drows.to(dtype) * down_bias[row_experts(drows, plan.offsets)]).sum(1, keepdim=True)
    return rows_to_slots(dots, plan).squeeze(-1)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else (rows * weights).to(rows.dtype)
