"""The exchange `all_to_all`: a token travels once for each of its experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard import Permutation, Plan, Workload
from tokenyard_parallel.exchanges._pipeline import PipelinedExchange, Precision, RankOrder


class SlotRows:
    """Rows are slots, and each row has one expert."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.ranks = workload.expert_parallel
        self.experts_per_rank = workload.num_experts // self.ranks
        self.permutation = permutation
        self.rows_per_token = float(workload.top_k)
        self.weights_per_row = 1

    def sort(self, topk_ids: Tensor) -> RankOrder:
        """Sort the slots by the rank that holds their expert; dropped slots are not sent."""
        ranks = (topk_ids // self.experts_per_rank).clamp(max=self.ranks)  # [T, K]
        plan = self.permutation.plan(ranks, self.ranks)
        return RankOrder(plan, plan.offsets.diff())

    def metadata(self, plan: Plan, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return [R, 2]: the weight, and the expert id on the rank."""
        weights = topk_weights.flatten().index_select(0, plan.order)
        ids = topk_ids.flatten().index_select(0, plan.order) % self.experts_per_rank
        return torch.stack((weights, ids.to(weights.dtype)), 1)


class SlotExchange(PipelinedExchange):
    """Sends a token to each of its experts.

    `chunks`, `validate` and `precision` are those of PipelinedExchange.
    """

    def __init__(
        self,
        workload: Workload,
        permutation: Permutation,
        group: Any = None,
        chunks: int = 1,
        validate: bool = False,
        precision: Precision | None = None,
    ):
        rows = SlotRows(workload, permutation)
        super().__init__(rows, workload, permutation, group, chunks, validate, precision)
