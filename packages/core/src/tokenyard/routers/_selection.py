"""Selecting experts: the K best, by groups if asked, within a capacity if there is one. Nothing has a gradient here."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.workload import RoutingRule


def best(scores: Tensor, k: int) -> Tensor:
    """Return the ids [..., k] of the highest scores, best first, equal scores lowest id first.

    ``torch.topk`` promises no order among equal scores; a stable sort does.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def select(scores: Tensor, top_k: int, rule: RoutingRule) -> Tensor:
    """Return the ids [T, K] that the rule selects by scores [T, E] (selection bias included)."""
    if rule.num_groups > 1 and rule.groups_kept < rule.num_groups:
        scores = _keep_best_groups(scores, rule)
    return best(scores, top_k)


def drop_over_capacity(topk_ids: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Replace by ``E + 1 + e`` the id of every slot that expert e has no room for; the first slots in order stay."""
    ids = topk_ids.reshape(-1)
    sorted_ids, order = ids.sort(stable=True)
    first = torch.searchsorted(
        sorted_ids, torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    )
    rank = torch.arange(ids.numel(), device=ids.device) - first[sorted_ids]
    kept = torch.where(rank < capacity, sorted_ids, sorted_ids + num_experts + 1)
    return torch.empty_like(ids).scatter(0, order, kept).view_as(topk_ids)


def chosen_experts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Return the expert the router chose for each slot, dropped for capacity or not; E where that is unknown."""
    undropped = torch.where(topk_ids > num_experts, topk_ids - (num_experts + 1), topk_ids)
    return undropped.clamp(max=num_experts)


def _keep_best_groups(scores: Tensor, rule: RoutingRule) -> Tensor:
    grouped = scores.unflatten(-1, (rule.num_groups, -1))  # [T, G, E/G]
    top = grouped.topk(2 if rule.group_score == "top2" else 1, dim=-1).values.sum(-1)
    kept = torch.zeros_like(top, dtype=torch.bool).scatter(-1, best(top, rule.groups_kept), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
