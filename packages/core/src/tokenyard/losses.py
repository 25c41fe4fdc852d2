"""Auxiliary losses of routers, computed from the Balance that each router returns.

Notation: L layers, T tokens per layer, K experts per token, E experts, F_e the number of slots
routed to expert e, P_e the sum over tokens of the probability of expert e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenyard.errors import one_of
from tokenyard.interfaces import Balance

Convention = Literal["megablocks", "hf"]


def load_balancing_loss(
    balances: Sequence[Balance],
    tokens: Tensor | int,
    top_k: int,
    convention: Convention = "megablocks",
) -> Tensor:
    """Return the load-balancing loss; it is lowest if all experts get the same number of tokens.

    "megablocks": the mean over layers of E / (K T^2) * sum_e F_e P_e, which is 1 if balanced
    (Fedus et al. 2021, arXiv 2101.03961, generalised to top-k).

    "hf": as in transformers, E * sum_e mean(F_e / T) * mean(P_e / T), with means over layers. It is
    K if balanced. It does not detect imbalances that cancel between layers.
    """
    counts = torch.stack([balance.counts for balance in balances])
    prob_sums = torch.stack([balance.prob_sum for balance in balances])
    return stacked_balancing_loss(counts, prob_sums, tokens, top_k, convention)


def stacked_balancing_loss(
    counts: Tensor,
    prob_sums: Tensor,
    tokens: Tensor | int,
    top_k: int,
    convention: Convention = "megablocks",
) -> Tensor:
    """Return what `load_balancing_loss` does, for F [L, E] and P [L, E] of all layers."""
    if convention == "hf":
        share, probs = _means(counts, prob_sums, tokens)
        return share.shape[1] * (share.mean(0) * probs.mean(0)).sum()
    return layer_balancing_losses(counts, prob_sums, tokens, top_k, convention).mean()


def layer_balancing_losses(
    counts: Tensor,
    prob_sums: Tensor,
    tokens: Tensor | int,
    top_k: int,
    convention: Convention = "megablocks",
) -> Tensor:
    """Return the load-balancing loss [L] of each layer, as if it were the only one.

    `counts` are F [L, E], and `prob_sums` P [L, E].
    """
    share, probs = _means(counts, prob_sums, tokens)
    scale = share.shape[1] if convention == "hf" else share.shape[1] / top_k
    return scale * (share * probs).sum(1)


def _means(counts: Tensor, prob_sums: Tensor, tokens: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return F_e / T and P_e / T, both [L, E]."""
    return counts.to(prob_sums.dtype) / tokens, prob_sums / tokens


def z_loss(balances: Sequence[Balance], tokens: Tensor | int) -> Tensor:
    """Return the mean over layers and tokens of logsumexp(logits)^2.

    Source: Zoph et al. 2022, ST-MoE, arXiv 2202.08906.
    """
    return torch.stack([b.z_sum for b in balances]).mean() / tokens


@dataclass(frozen=True)
class AuxiliaryLoss:
    """The weighted sum of a model's router losses.

    Raises ConfigError for an unknown convention.
    """

    balance_weight: float = 0.0
    z_weight: float = 0.0
    convention: Convention = "megablocks"

    def __post_init__(self) -> None:
        one_of("load-balancing convention", self.convention, get_args(Convention))

    def __call__(
        self, balances: Sequence[Balance], tokens: Tensor | int, top_k: int
    ) -> Tensor | float:
        """Return the auxiliary loss of `tokens` tokens; 0.0 without MoE layers or weights."""
        loss: Tensor | float = 0.0
        if balances and self.balance_weight:
            loss = self.balance_weight * load_balancing_loss(
                balances, tokens, top_k, self.convention
            )
        if balances and self.z_weight:
            loss = loss + self.z_weight * z_loss(balances, tokens)
        return loss
