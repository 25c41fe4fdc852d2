"""The exchange `all_to_all_tokens`: a row for each token and rank, so a token travels at most once to each rank.

Where a token has several experts on one rank, the rank adds up their outputs before the way back. What the token's
other experts are is told as dropped ids.
"""

from __future__ import annotations

from math import comb
from typing import Any

import torch
from torch import Tensor

from tokenyard import Permutation, Plan, Workload
from tokenyard_parallel.exchanges._pipeline import PipelinedExchange, Sorted


class TokenPacking:
    """Rows are tokens; each has those of its experts that the rank holds."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.ranks = workload.expert_parallel
        self.each, self.permutation = workload.num_experts // self.ranks, permutation
        experts, top_k = workload.num_experts, workload.top_k
        nowhere = comb(experts - self.each, top_k) / comb(
            experts, top_k
        )  # how often a rank holds none of the K
        self.rows = self.ranks * (1 - nowhere)

    def sort(self, topk_ids: Tensor) -> Sorted:
        """Line up tokens by the ranks that hold their experts, by the first slot of each; dropped slots stay."""
        ranks = self._ranks(topk_ids)
        seen = (
            (ranks.unsqueeze(2) == ranks.unsqueeze(1)).tril(-1).any(2)
        )  # [T, K]: an earlier slot goes there
        plan = self.permutation.plan(ranks.masked_fill(seen, self.ranks), self.ranks)
        every = torch.arange(self.ranks, device=ranks.device, dtype=ranks.dtype)
        return Sorted(plan, (ranks.flatten().unsqueeze(1) == every).sum(0, dtype=torch.int32))

    def describe(self, plan: Plan, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return [R, 2K]: the token's weights, and its ids on the rank, where they are dropped if not there."""
        tokens = plan.order // plan.top_k
        weights, ids = topk_weights.index_select(0, tokens), topk_ids.index_select(0, tokens)
        rank = self._ranks(topk_ids).flatten().index_select(0, plan.order).unsqueeze(1)
        here = ids // self.each == rank
        return torch.cat(
            (weights, torch.where(here, ids - rank * self.each, self.each).to(weights.dtype)), 1
        )

    def _ranks(self, topk_ids: Tensor) -> Tensor:
        return (topk_ids // self.each).clamp(max=self.ranks)


class TokenExchange(PipelinedExchange):
    """Sends a token once to each rank that holds experts of it.

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
            TokenPacking(workload, permutation), workload, permutation, group, chunks, validate
        )
