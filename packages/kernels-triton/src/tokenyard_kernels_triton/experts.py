"""The `triton` experts: gather, two products with the activation between, and the weighted sum, without host waits."""

from __future__ import annotations

import functools
from typing import ClassVar, get_args

import torch
from torch import Tensor

from tokenyard.activations import up_rows
from tokenyard.errors import ConfigError
from tokenyard.experts import ExpertsCall
from tokenyard.interfaces import ExpertWeights, Permutation, Plan, logits_dtype
from tokenyard.workload import Workload
from tokenyard_kernels_triton.ops._experts import Products, Save, compile_experts, experts


class TritonExperts:
    """Computes experts by Triton kernels; once differentiable.

    `save` says what stands between forward and backward besides x: the pre-activation ("pre_activation", 4KF bytes a
    token in bfloat16 when gated), the same in 8-bit blocks ("fp8", 0.516 of it, with a relative error of some 2.5 % in
    the pre-activation that gradients see), or nothing ("recompute", which computes it again). Raises ConfigError for
    another word.
    """

    products: ClassVar[Products] = "portable"

    def __init__(self, workload: Workload, permutation: Permutation, save: Save = "pre_activation"):
        if save not in get_args(Save):
            known = ", ".join(get_args(Save))
            raise ConfigError(f"backends.experts.save is {save!r}; known are: {known}")
        self.workload, self.activation, self.save = workload, workload.activation, save

    def prepare(self, tokens: int) -> None:
        """Compile the kernels for so many tokens, in parallel. Holds one layer's weights and gradients meanwhile."""
        w = self.workload
        experts, slots = w.num_experts // w.expert_parallel, tokens * w.top_k
        empty = functools.partial(torch.empty, device=w.device)
        order, inverse, offsets = (
            empty(size, dtype=torch.int32) for size in (slots, slots, experts + 1)
        )
        rows = up_rows(w.activation, w.ffn_dim)
        weights = ExpertWeights(
            empty(experts, rows, w.dim, dtype=w.dtype),
            empty(experts, w.dim, w.ffn_dim, dtype=w.dtype),
            empty(experts, rows, dtype=w.dtype) if w.bias else None,
            empty(experts, w.dim, dtype=w.dtype) if w.bias else None,
        )
        x = empty(tokens, w.dim, dtype=w.dtype)
        topk_weights = empty(tokens, w.top_k, dtype=logits_dtype(w.dtype))
        plan = Plan(order, inverse, offsets, w.top_k)
        compile_experts(
            ExpertsCall(x, plan, topk_weights, weights, w.activation), self.save, self.products
        )

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return experts(
            x, plan, topk_weights, weights, self.activation, save=self.save, kernels=self.products
        )


class GluonExperts(TritonExperts):
    """The same with its products written in Gluon, for Hopper: warps that load, and warpgroups that multiply."""

    products = "gluon"
