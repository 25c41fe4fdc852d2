"""The exchange `all_to_all_tokens`: a token travels at most once to each rank.

If several experts of a token are on one rank, that rank sums their outputs before it sends them
back. Experts on other ranks appear there as dropped ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard import Permutation, Plan, Workload
from tokenyard_parallel.exchanges._pipeline import PipelinedExchange, Precision, RankOrder


class TokenRows:
    """Rows are tokens, and each row has those of the token's experts that the rank holds."""

    def __init__(self, workload: Workload, permutation: Permutation):
        self.ranks = workload.expert_parallel
        self.experts_per_rank = workload.num_experts // self.ranks
        self.permutation = permutation
        self.rows_per_token = workload.ranks_per_token
        self.weights_per_row = workload.top_k

    def sort(self, topk_ids: Tensor) -> RankOrder:
        """Sort the tokens by the ranks that hold their experts; dropped slots are not sent.

        The plan holds the first slot of a token on each rank.
        """
        ranks = self._ranks(topk_ids)  # [T, K]
        same_rank = ranks.unsqueeze(2) == ranks.unsqueeze(1)  # [T, K, K]
        repeated = same_rank.tril(-1).any(2)  # [T, K]: an earlier slot goes to the same rank
        plan = self.permutation.plan(ranks.masked_fill(repeated, self.ranks), self.ranks)
        all_ranks = torch.arange(self.ranks, device=ranks.device, dtype=ranks.dtype)
        slots = (ranks.flatten().unsqueeze(1) == all_ranks).sum(0, dtype=torch.int32)
        return RankOrder(plan, slots)

    def metadata(self, plan: Plan, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return [R, 2K]: the token's weights, and its expert ids on the rank.

        Experts on other ranks have dropped ids."""
        tokens = plan.order // plan.top_k  # [R]
        weights = topk_weights.index_select(0, tokens)  # [R, K]
        ids = topk_ids.index_select(0, tokens)  # [R, K]
        rank = self._ranks(topk_ids).flatten().index_select(0, plan.order).unsqueeze(1)  # [R, 1]
        on_rank = ids // self.experts_per_rank == rank
        local_ids = torch.where(on_rank, ids - rank * self.experts_per_rank, self.experts_per_rank)
        return torch.cat((weights, local_ids.to(weights.dtype)), 1)

    def _ranks(self, topk_ids: Tensor) -> Tensor:
        """Return the rank [T, K] of each slot; that of a dropped slot is `self.ranks`."""
        return (topk_ids // self.experts_per_rank).clamp(max=self.ranks)


class TokenExchange(PipelinedExchange):
    """Sends a token once to each rank that holds experts of it.

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
        rows = TokenRows(workload, permutation)
        super().__init__(rows, workload, permutation, group, chunks, validate, precision)
