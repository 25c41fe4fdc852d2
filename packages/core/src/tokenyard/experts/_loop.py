"""The `loop` kernel: every expert on all tokens, masked. E/K times the work, and any number of derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.activations import activate
from tokenyard.interfaces import ExpertWeights, Permutation, Plan, logits_dtype
from tokenyard.permutations._moves import kept_slots
from tokenyard.workload import Workload


class LoopExperts:
    """Computes experts one after another by plain differentiable torch functions."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.activation = workload.activation

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        wide = logits_dtype(x.dtype)
        experts = torch.searchsorted(plan.offsets[1:], plan.inverse, right=True).view(
            -1, plan.top_k
        )  # [T, K]
        live = kept_slots(plan).any(1, keepdim=True)
        x = torch.where(
            live, x, x.new_zeros(())
        )  # 0 * NaN would reach the output of a token that was dropped
        y = x.new_zeros(x.shape, dtype=wide)
        for e in range(weights.up.shape[0]):
            chosen = experts == e
            gates = (
                chosen.to(wide) if topk_weights is None else torch.where(chosen, topk_weights, 0)
            )
            y = y + gates.sum(1, keepdim=True) * self._expert(x, e, weights).to(wide)
        return torch.where(live, y, y.new_zeros(())).to(x.dtype)

    def _expert(self, x: Tensor, e: int, weights: ExpertWeights) -> Tensor:
        up_bias = None if weights.up_bias is None else weights.up_bias[e]
        down_bias = None if weights.down_bias is None else weights.down_bias[e]
        return F.linear(
            activate(F.linear(x, weights.up[e], up_bias), self.activation),
            weights.down[e],
            down_bias,
        )
