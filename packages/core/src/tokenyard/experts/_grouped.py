"""The base of unfused expert kernels: permute, compute sorted rows, unpermute."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.workload import Workload


class GroupedExperts(ABC):
    """An expert kernel of which only `mlp`, on rows sorted by expert, is left to write."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.workload, self.permutation = workload, permutation

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        rows = self.mlp(self.permutation.permute(x, plan), plan.offsets, weights)
        return self.permutation.unpermute(rows, plan, topk_weights)

    @abstractmethod
    def mlp(self, rows: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
        """Return down(act(up(row))) [R, D] for rows [R, D], where ``offsets[e]:offsets[e + 1]`` are of expert e.

        Differentiable in rows and weights. What stands at and past ``offsets[-1]`` is never read; its gradient is zero.
        """
