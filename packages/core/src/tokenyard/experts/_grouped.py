"""The base class of unfused expert kernels: permute, compute sorted rows, unpermute."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.workload import Workload


class GroupedExperts(ABC):
    """Base class of an unfused expert kernel. A subclass implements `mlp` on sorted rows."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.workload = workload
        self.permutation = permutation

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        rows = self.mlp(self.permutation.permute(x, plan), plan.offsets, weights)
        return self.permutation.unpermute(rows, plan, topk_weights)

    @abstractmethod
    def mlp(self, rows: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
        """Return down(act(up(row))) [R, D] for rows [R, D], differentiable in rows and weights.

        Rows ``offsets[e]:offsets[e + 1]`` belong to expert e. Rows from ``offsets[-1]`` on are
        never read, and their gradient is zero.
        """
