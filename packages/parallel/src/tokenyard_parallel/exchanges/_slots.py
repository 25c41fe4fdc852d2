"""The exchange `all_to_all`: a row for each slot, so a token travels once for each of its experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard import Permutation, Plan, Workload
from tokenyard_parallel.exchanges._pipeline import PipelinedExchange, Sorted


class SlotPacking:
    """Rows are slots; each has one expert."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.ranks, self.rows = workload.expert_parallel, float(workload.top_k)
        self.each, self.permutation = workload.num_experts // self.ranks, permutation

    def sort(self, topk_ids: Tensor) -> Sorted:
        """Line up the slots by the rank that holds their expert; dropped ones stay."""
        plan = self.permutation.plan((topk_ids // self.each).clamp(max=self.ranks), self.ranks)
        return Sorted(plan, plan.offsets.diff())

    def describe(self, plan: Plan, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return [R, 2]: weight, and id on the rank."""
        weights = topk_weights.flatten().index_select(0, plan.order)
        ids = topk_ids.flatten().index_select(0, plan.order) % self.each
        return torch.stack((weights, ids.to(weights.dtype)), 1)


class SlotExchange(PipelinedExchange):
    """Sends a token to each of its experts.

    `chunks` and `validate` are those of PipelinedExchange.
    """

    def __init__(
        self,
        workload: Workload,
        permutation: Permutation,
        group: Any = None,
        chunks: int = 1,
        validate: bool = False,
    ):
        super().__init__(
            SlotPacking(workload, permutation), workload, permutation, group, chunks, validate
        )
