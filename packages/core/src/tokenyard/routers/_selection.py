"""Select experts: the K highest scores, from the best groups only, within a capacity.

No function has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.workload import RoutingRule


def best(scores: Tensor, k: int) -> Tensor:
    """Return the ids [..., k] of the highest scores, best first, equal scores lowest id first."""
    # a stable sort, because torch.topk does not define the order of equal scores
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def select(scores: Tensor, top_k: int, rule: RoutingRule) -> Tensor:
    """Return the selected ids [T, K] for scores [T, E], which include the selection bias."""
    if rule.num_groups > 1 and rule.groups_kept < rule.num_groups:
        scores = _keep_best_groups(scores, rule)
    return best(scores, top_k)


def ranked(scores: Tensor, dim: int) -> Tensor:
    """Return indices [T, E] that sort scores [T, E] along `dim`, highest first, ties in order."""
    return scores.argsort(dim=dim, descending=True, stable=True)


def keep_first(selected: Tensor, ranking: Tensor, limit: Tensor | int, dim: int) -> Tensor:
    """Return the selection [T, E] with at most `limit` entries along `dim`: the first ranked ones.

    `ranking` [T, E] comes from ``ranked(scores, dim)``.
    """
    in_order = selected.gather(dim, ranking)
    kept = in_order & (in_order.cumsum(dim) <= limit)
    return torch.zeros_like(selected).scatter(dim, ranking, kept)


def selected_ids(selected: Tensor, ranking: Tensor, top_k: int) -> Tensor:
    """Return the ids [T, K] of a selection [T, E] in the order of ranking [T, E], padded with E.

    A token with more than K selected experts keeps the first K.
    """
    in_order = selected.gather(1, ranking)
    ids = ranking.masked_fill(~in_order, selected.shape[1])
    # a stable sort moves the unselected experts behind the selected ones
    front = (~in_order).to(torch.uint8).argsort(dim=1, stable=True)[:, :top_k]
    return ids.gather(1, front)


def drop_over_capacity(topk_ids: Tensor, num_experts: int, capacity: Tensor | int) -> Tensor:
    """Return topk_ids [T, K] with ``E + 1 + e`` for each slot that exceeds expert e's capacity.

    An expert keeps its first `capacity` slots in token order. A capacity of 0 drops nothing, as in
    MegaBlocks: few tokens, of which fewer than one slot falls to each expert, keep their experts.
    Ids E, which are dropped, stay.
    """
    ids = topk_ids.reshape(-1)  # [N]
    sorted_ids, order = ids.sort(stable=True)  # [N], [N]
    experts = torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype)
    first = torch.searchsorted(sorted_ids, experts)  # [E + 1] first position of each id
    position = torch.arange(ids.numel(), device=ids.device) - first[sorted_ids]  # [N]
    full = (position >= capacity) & (sorted_ids < num_experts) & (capacity > 0)
    new_ids = torch.where(full, sorted_ids + num_experts + 1, sorted_ids)
    return torch.empty_like(ids).scatter(0, order, new_ids).view_as(topk_ids)


def chosen_experts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Return the expert that the router chose for each slot; E if it is unknown.

    Undoes `drop_over_capacity`.
    """
    ids = torch.where(topk_ids > num_experts, topk_ids - (num_experts + 1), topk_ids)
    return ids.clamp(max=num_experts)


def _keep_best_groups(scores: Tensor, rule: RoutingRule) -> Tensor:
    """Return scores [T, E] with -inf for the experts outside of each token's best groups."""
    grouped = scores.unflatten(-1, (rule.num_groups, -1))  # [T, G, E/G]
    summands = 2 if rule.group_score == "top2" else 1
    group_scores = grouped.topk(summands, dim=-1).values.sum(-1)  # [T, G]
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept = kept.scatter(-1, best(group_scores, rule.groups_kept), True)  # [T, G]
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
