"""The `cpu` kernel: compute one expert after another, so that temporaries stay in the CPU cache.

The equations and the saved tensors are those of the `torch` kernel. Weights are applied to the
activation, so a token's output is a plain sum of rows. ``F.embedding_bag`` gathers and adds the
rows in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.activations import activate
from tokenyard.experts._cpu_backward import cpu_backward
from tokenyard.experts._cpu_rows import max_padded_rows, new_rows, pad_rows, sum_by_token, weighted
from tokenyard.experts._op import ExpertsCall, register_experts_op
from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.workload import Workload


class CpuExperts:
    """Computes one expert after another on a CPU; once differentiable."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.activation = workload.activation

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return _experts(x, plan, topk_weights, weights, self.activation)


def _forward(call: ExpertsCall) -> tuple[Tensor, Tensor]:
    """Return y [T, D] and the pre-activation z [padded rows, 2F or F]."""
    x, plan, topk_weights, (up, down, up_bias, down_bias), activation = call
    padded = pad_rows(plan, topk_weights, x.dtype)
    z = x.new_empty(padded.max_rows, up.shape[1])
    rows = new_rows(padded, x.shape[1], x.dtype)
    for e, start, end in padded.segments:
        weights = padded.weights[start:end]  # [n, 1]
        x_e = x.index_select(0, padded.tokens[start:end])  # [n, D]
        z_e = torch.mm(x_e, up[e].T, out=z[start:end])  # [n, 2F or F]
        if up_bias is not None:
            z_e += up_bias[e]
        a = weighted(activate(z_e, activation), weights)  # [n, F]
        y_e = torch.mm(a, down[e].T, out=rows[start:end])  # [n, D]
        if down_bias is not None:
            y_e += weighted(down_bias[e].expand(end - start, -1), weights)
    z[len(padded.tokens) :] = 0  # rows past L: all of an operator's output must be defined
    return sum_by_token(rows, padded), z


def _saved(call: ExpertsCall) -> tuple[Tensor]:
    up = call.weights.up
    rows = max_padded_rows(call.plan.order.shape[0], up.shape[0], call.x.dtype)
    return (call.x.new_empty(rows, up.shape[1]),)


_experts = register_experts_op(
    "tokenyard::cpu_experts", _forward, cpu_backward, _saved, device="cpu"
)
