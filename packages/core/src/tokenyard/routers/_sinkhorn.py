"""Sinkhorn routing: scores are balanced over the batch before each token selects experts."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.routers._batch import BatchRouter
from tokenyard.routers._options import count_option
from tokenyard.routers._selection import select
from tokenyard.workload import Workload


class SinkhornRouter(BatchRouter):
    """Each token selects its K highest entries of a matrix that is balanced over experts.

    Sinkhorn's iteration scales the rows and columns of exp(logits) [T, E] in turn, until each token
    sums to 1 and each expert to T / E. This adds the same number to an expert's logits for every
    token, like a selection bias that is found anew for each batch. Counts are then close to equal,
    not exactly. No slot is dropped. Weights come from the scores, as in top-k.

    Source: S-BASE of Clark et al. 2022, arXiv 2202.01169, for K = 1; for K > 1, Megatron-LM.

    This is not causal: the scaling depends on all T tokens of the batch. In evaluation, where
    `self.training` is False, each token selects its K highest scores, as in Megatron-LM.

    The option `iterations` of the rule is the number of times that rows and columns are scaled.
    Default: 8.
    """

    rule_options = ("iterations",)

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.iterations = count_option(self.rule, "iterations", 8, least=1)

    @torch.no_grad()
    def _select(self, logits: Tensor, scores: Tensor) -> Tensor:
        if not self.training:
            return super()._select(logits, scores)
        balanced = logits  # log of the matrix
        for _ in range(self.iterations):
            balanced = balanced - balanced.logsumexp(1, keepdim=True)
            balanced = balanced - balanced.logsumexp(0, keepdim=True)
        return select(balanced, self.top_k, self.rule)
