"""Expert choice: each expert selects tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenyard.routers._batch import BatchRouter
from tokenyard.routers._options import flag_option, number_option
from tokenyard.routers._selection import keep_first, ranked, selected_ids
from tokenyard.workload import Workload


class ExpertChoiceRouter(BatchRouter):
    """Each expert selects the C tokens with its highest scores, C = ceil(factor * K * T / E).

    Source: Zhou et al. 2022, arXiv 2202.09368. There a token may have any number of experts. Here
    it has at most K: if more experts select it, it keeps its K highest scores. A token that fewer
    than K experts select has dropped slots, and maybe no expert at all.

    This is not causal: whether an expert selects a token depends on all T tokens of the batch,
    later tokens of the same sequence included. In evaluation, where `self.training` is False, each
    token selects its K best experts instead, so evaluation and generation are causal.

    Options of the rule:

    * `factor`: the mean number of experts of a token as a multiple of K. Default: 1.
    * `evaluate_batch`: let experts select tokens in evaluation too. Default: false.
    """

    rule_options = ("factor", "evaluate_batch")

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.factor = number_option(self.rule, "factor", 1.0)
        self.evaluate_batch = flag_option(self.rule, "evaluate_batch", False)

    @torch.no_grad()
    def _select(self, logits: Tensor, scores: Tensor) -> Tensor:
        if not (self.training or self.evaluate_batch):
            return super()._select(logits, scores)
        capacity = math.ceil(self.factor * self.top_k * scores.shape[0] / self.num_experts)
        every = torch.ones_like(scores, dtype=torch.bool)
        selected = keep_first(every, ranked(scores, 0), capacity, 0)  # [T, E]
        return selected_ids(selected, ranked(scores, 1), self.top_k)
