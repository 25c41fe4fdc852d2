"""Token rounding: top-k, with each expert's count rounded to a multiple of a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.errors import ConfigError
from tokenyard.routers._batch import BatchRouter
from tokenyard.routers._options import count_option
from tokenyard.routers._selection import keep_first, ranked, selected_ids
from tokenyard.workload import Workload

_ROUNDS = 4
"""How often experts that lack tokens ask for more. Tokens that are asked twice keep one."""


class TokenRoundingRouter(BatchRouter):
    """Top-k, with the number of tokens of each expert rounded to the nearest multiple of a tile.

    So no tile of a grouped matmul has padding rows. Source: SonicMoE, arXiv 2512.14080, section 5.

    1. Each token selects its K - `spare` best experts.
    2. An expert whose count rounds down drops the tokens with its lowest scores.
    3. An expert whose count rounds up adds the tokens with its highest scores that have a free
       slot. If it finds too few, it rounds down.

    In the paper, a token may get more than K experts. Here it has K slots: a slot is free if an
    expert dropped it in step 2, or if it is a `spare` one. Nothing is rounded if the mean count of
    an expert, K * T / E, is less than a tile.

    This is not causal: whether a token keeps an expert depends on all T tokens of the batch. In
    evaluation, where `self.training` is False, counts are not rounded, as in the paper: each token
    selects its K - `spare` best experts.

    Options of the rule:

    * `tile`: rows of a tile. Default: 128.
    * `spare`: slots of each token that only step 3 fills. Default: 0.
    """

    rule_options = ("tile", "spare")

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.tile = count_option(self.rule, "tile", 128, least=1)
        self.spare = count_option(self.rule, "spare", 0, least=0)
        if self.spare >= self.top_k:
            raise ConfigError(
                f"'spare' is {self.spare}, but a token has {self.top_k} slots; "
                f"choose from 0 to {self.top_k - 1}"
            )

    @torch.no_grad()
    def _select(self, logits: Tensor, scores: Tensor) -> Tensor:
        ids = super()._select(logits, scores)[:, : self.top_k - self.spare]  # best first
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)  # [T, E]
        by_token = ranked(scores, 1)
        if self.training and self.top_k * scores.shape[0] >= self.num_experts * self.tile:
            selected = self._round(selected, ranked(scores, 0), by_token)
        return selected_ids(selected, by_token, self.top_k)

    def _round(self, selected: Tensor, by_expert: Tensor, by_token: Tensor) -> Tensor:
        """Return a selection [T, E] in which each expert's count is a multiple of the tile.

        `by_expert` and `by_token` [T, E] rank the scores of each expert and of each token.
        """
        tile = self.tile
        counts = selected.sum(0)  # [E]
        most = selected.shape[0] // tile * tile
        target = ((counts + tile // 2) // tile * tile).clamp(max=most)
        selected = keep_first(selected, by_expert, target, 0)
        for _ in range(_ROUNDS):
            free = self.top_k - selected.sum(1, keepdim=True)  # [T, 1]
            missing = target - selected.sum(0)  # [E]
            asked = keep_first(~selected & (free > 0), by_expert, missing, 0)
            selected = selected | keep_first(asked, by_token, free, 1)
        return keep_first(selected, by_expert, selected.sum(0) // tile * tile, 0)
