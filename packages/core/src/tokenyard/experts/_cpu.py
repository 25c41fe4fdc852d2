"""The `cpu` kernel: one expert after another, so that all but what must be kept stays in the processor's cache.

Mathematics and what is saved are the `torch` kernel's. The weight of a slot is applied to the activation, so that a
token's output is a plain sum of rows, which ``F.embedding_bag`` gathers and adds in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.activations import activate
from tokenyard.experts._cpu_backward import cpu_backward
from tokenyard.experts._cpu_rows import lay_out, rows_bound, rows_to_fill, sum_by_token, weighted
from tokenyard.experts._op import ExpertsCall, register_experts_op
from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.workload import Workload


class CpuExperts:
    """Computes experts one after another on a CPU; once differentiable."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.activation = workload.activation

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return _experts(x, plan, topk_weights, weights, self.activation)


def _forward(call: ExpertsCall) -> tuple[Tensor, Tensor]:
    """Return y [T, D] and the pre-activation z [rows of the layout, 2F or F]."""
    x, plan, topk_weights, (up, down, up_bias, down_bias), activation = call
    layout = lay_out(plan, topk_weights, x.dtype)
    z = x.new_empty(layout.rows, up.shape[1])
    rows = rows_to_fill(layout, x.shape[1], x.dtype)
    for e, a, b in layout.segments:
        torch.mm(x.index_select(0, layout.tokens[a:b]), up[e].T, out=z[a:b])
        if up_bias is not None:
            z[a:b] += up_bias[e]
        torch.mm(
            weighted(activate(z[a:b], activation), layout.weights[a:b]), down[e].T, out=rows[a:b]
        )
        if down_bias is not None:
            rows[a:b] += weighted(down_bias[e].expand(b - a, -1), layout.weights[a:b])
    z[len(layout.tokens) :] = 0
    return sum_by_token(rows, layout), z


def _saved(call: ExpertsCall) -> tuple[Tensor]:
    up = call.weights.up
    return (
        call.x.new_empty(
            rows_bound(call.plan.order.shape[0], up.shape[0], call.x.dtype), up.shape[1]
        ),
    )


_experts = register_experts_op(
    "tokenyard::cpu_experts", _forward, cpu_backward, _saved, device="cpu"
)
