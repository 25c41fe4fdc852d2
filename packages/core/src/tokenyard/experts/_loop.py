"""The `loop` kernel: compute all tokens with every expert, and mask the result.

It does E/K times the FLOPs of other kernels. It is the only one with higher derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.activations import activate
from tokenyard.interfaces import ExpertWeights, Permutation, Plan, logits_dtype
from tokenyard.permutations._moves import kept_slots
from tokenyard.workload import Workload


class LoopExperts:
    """Computes one expert after another with plain differentiable torch functions."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.activation = workload.activation

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        wide = logits_dtype(x.dtype)
        experts = torch.searchsorted(plan.offsets[1:], plan.inverse, right=True)  # [N]
        experts = experts.view(-1, plan.top_k)  # [T, K]; E if the slot is dropped
        live = kept_slots(plan).any(1, keepdim=True)  # [T, 1]
        # a dropped token may hold NaN, and 0 * NaN is NaN
        x = torch.where(live, x, x.new_zeros(()))
        y = x.new_zeros(x.shape, dtype=wide)
        for e in range(weights.up.shape[0]):
            chosen = experts == e  # [T, K]
            if topk_weights is None:
                gates = chosen.to(wide)
            else:
                gates = torch.where(chosen, topk_weights, 0)
            y = y + gates.sum(1, keepdim=True) * self._expert(x, e, weights).to(wide)
        return torch.where(live, y, y.new_zeros(())).to(x.dtype)

    def _expert(self, x: Tensor, e: int, weights: ExpertWeights) -> Tensor:
        up_bias = None if weights.up_bias is None else weights.up_bias[e]
        down_bias = None if weights.down_bias is None else weights.down_bias[e]
        z = F.linear(x, weights.up[e], up_bias)  # [T, 2F or F]
        return F.linear(activate(z, self.activation), weights.down[e], down_bias)
