"""A routing algorithm: expert choice (Zhou et al. 2022, arXiv 2202.09368)."""

from __future__ import annotations

import math

from torch import Tensor

from tokenyard import Routing, Workload
from tokenyard.routers import TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """Each expert takes the C tokens that score highest for it, C = factor * K * T / E.

    The factor is the option `factor` of the rule, 1 by default. A token that more than K experts
    take keeps its K best ones. Slots without an expert are dropped, so a token may get none.
    Tokens of a batch compete for experts, so a model that uses it is not causal in training.
    """

    rule_options = ("factor",)

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.factor = float(workload.router.options.get("factor", 1.0))

    def forward(self, x: Tensor, topk_ids: Tensor | None = None) -> Routing:
        """Route x [T, D]. It has no `padding`: all tokens compete, so packed rows are refused."""
        return super().forward(x, topk_ids)

    def choose(self, logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids and weights [T, K] for logits [T, E]. Given ids are only weighted."""
        scores = logits.softmax(-1)
        ids = self.take(scores.detach()) if topk_ids is None else topk_ids.long()
        kept = ids < self.num_experts
        return ids, scores.gather(1, ids.clamp(max=self.num_experts - 1)) * kept

    def take(self, scores: Tensor) -> Tensor:
        """Return ids [T, K] for scores [T, E], E where a token has fewer than K experts."""
        tokens = scores.shape[0]
        capacity = min(tokens, math.ceil(self.factor * self.top_k * tokens / self.num_experts))
        taken = scores.topk(capacity, dim=0).indices  # [C, E]
        masked = scores.new_full(scores.shape, -1.0).scatter(0, taken, scores.gather(0, taken))
        best, ids = masked.topk(self.top_k, dim=1)  # [T, K]
        return ids.masked_fill(best < 0, self.num_experts)
