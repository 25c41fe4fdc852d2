"""The `cpu` kernel: one expert after another, so that all but what must be kept stays in the processor's cache.

Mathematics and what is saved are the `torch` kernel's. The weight of a slot is applied to the activation, so that a
token's output is a plain sum of rows, which ``F.embedding_bag`` gathers and adds in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import activate
from tokenyard.experts._cpu_backward import cpu_experts_backward_op
from tokenyard.experts._cpu_rows import lay_out, rows_bound, rows_to_fill, sum_by_token, weighted
from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.workload import Workload


class CpuExperts:
    """Computes experts one after another on a CPU; once differentiable."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.activation = workload.activation

    def __call__(self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        y, _ = cpu_experts_op(x, *plan[:3], topk_weights, *weights, plan.top_k, self.activation)
        return y


@torch.library.custom_op("tokenyard::cpu_experts", mutates_args=(), device_types="cpu")
def cpu_experts_op(
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
    """Return y [T, D] and the pre-activation z [rows of the layout, 2F or F]."""
    layout = lay_out(Plan(order, inverse, offsets, top_k), topk_weights, x.dtype)
    z, rows = x.new_empty(layout.rows, up.shape[1]), rows_to_fill(layout, x.shape[1], x.dtype)
    for e, a, b in layout.segments:
        torch.mm(x.index_select(0, layout.tokens[a:b]), up[e].T, out=z[a:b])
        if up_bias is not None:
            z[a:b] += up_bias[e]
        torch.mm(weighted(activate(z[a:b], activation), layout.weights[a:b]), down[e].T, out=rows[a:b])
        if down_bias is not None:
            rows[a:b] += weighted(down_bias[e].expand(b - a, -1), layout.weights[a:b])
    z[len(layout.tokens) :] = 0
    return sum_by_token(rows, layout), z


@cpu_experts_op.register_fake
def _(
    x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor | None, up: Tensor, *rest: Any
) -> Any:
    return x.new_empty(x.shape), x.new_empty(rows_bound(order.shape[0], up.shape[0], x.dtype), up.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, order, inverse, offsets, topk_weights, up, down, _, down_bias, top_k, activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or z, which nothing else reads, gets a gradient of zeros, written out
    ctx.save_for_backward(x, output[1], order, inverse, offsets, topk_weights, up, down, down_bias)
    ctx.top_k, ctx.activation = top_k, activation


def _backward(ctx: Any, dy: Tensor, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5, 6, 7, 8)]
    grads = cpu_experts_backward_op(dy, *ctx.saved_tensors, ctx.top_k, ctx.activation, needs)
    dx, dweights, dup, ddown, dup_bias, ddown_bias = (g if n else None for g, n in zip(grads, needs))
    return dx, None, None, None, dweights, dup, ddown, dup_bias, ddown_bias, None, None


cpu_experts_op.register_autograd(_backward, setup_context=_setup_context)
