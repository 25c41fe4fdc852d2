"""The `triton` permutation: a plan in three launches, and copies that read each token once."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.interfaces import Plan, logits_dtype
from tokenyard.workload import Workload
from tokenyard_kernels_triton.launching import compiling
from tokenyard_kernels_triton.ops._permutation import permute_op, unpermute_op, weights_backward_op
from tokenyard_kernels_triton.ops._plan import plan_op


class TritonPermutation:
    """Plans and copies by Triton kernels: deterministic, without atomics or host syncs."""

    def __init__(self, workload: Workload):
        self.workload = workload

    def prepare(self, tokens: int) -> None:
        """Compile the kernels for batches of `tokens` tokens, in parallel."""
        w = self.workload
        ids = torch.empty(tokens, w.top_k, dtype=torch.int32, device=w.device)
        x = torch.empty(tokens, w.dim, dtype=w.dtype, device=w.device)
        topk_weights = torch.empty(tokens, w.top_k, dtype=logits_dtype(w.dtype), device=w.device)
        with compiling():
            plan = self.plan(ids, w.num_experts // w.expert_parallel)
            for weights in (None, topk_weights):
                rows = permute_op(x, weights, *plan)
                unpermute_op(rows, weights, *plan)
            weights_backward_op(x, rows, *plan)

    def plan(self, topk_ids: Tensor, num_experts: int, rows: int | None = None) -> Plan:
        """Sort the slots of topk_ids [T, K] by expert, stably; dropped slots form the tail."""
        slots = topk_ids.numel()
        rows = slots if rows is None else min(rows, slots)
        order, inverse, offsets = plan_op(topk_ids, num_experts, rows)
        return Plan(order, inverse, offsets, topk_ids.shape[1])

    def permute(self, x: Tensor, plan: Plan) -> Tensor:
        """Copy tokens x [T, D] to their rows [R, D]; the tail is zero."""
        return permute_op(x, None, *plan)

    def unpermute(self, rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
        """Sum each token's rows [R, D], weighted if weights [T, K] are given, to [T, D]."""
        return unpermute_op(rows, topk_weights, *plan)
