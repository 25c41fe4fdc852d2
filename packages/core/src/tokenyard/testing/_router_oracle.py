"""The reference implementation of the top-k router, token by token in plain Python."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.interfaces import Routing, logits_dtype
from tokenyard.workload import RoutingRule


def scores(logits: Tensor, rule: RoutingRule) -> Tensor:
    """Return the scores [T, E] of logits [T, E]."""
    return 1 / (1 + torch.exp(-logits)) if rule.score == "sigmoid" else torch.softmax(logits, -1)


def select(logits: Tensor, bias: Tensor | None, rule: RoutingRule, top_k: int) -> list[list[int]]:
    """Return the K experts of each token, best first; equal scores lowest id first."""
    if rule.select_first:
        ranking = logits
    elif rule.score == "sigmoid":
        ranking = logits.sigmoid()
    else:
        ranking = logits.softmax(-1)
    if bias is not None:
        ranking = ranking + bias
    return [_select_one(row, rule, top_k) for row in ranking.tolist()]


def within_capacity(
    chosen: list[list[int]], rule: RoutingRule, num_experts: int
) -> list[list[int]]:
    """Return the ids with ``E + 1 + e`` for each slot that exceeds expert e's capacity.

    Earlier tokens have priority. A capacity of 0 drops nothing.
    """
    if rule.capacity_factor is None:
        return chosen
    slots = sum(len(row) for row in chosen)
    capacity = int(rule.capacity_factor * slots / num_experts)
    room = [capacity or slots] * num_experts
    kept: list[list[int]] = []
    for row in chosen:
        kept.append([])
        for e in row:
            kept[-1].append(e if room[e] > 0 else num_experts + 1 + e)
            room[e] -= 1
    return kept


def weigh(logits: Tensor, ids: Tensor, rule: RoutingRule) -> Tensor:
    """Return the weights [T, K] of the experts ids [T, K]."""
    if rule.select_first:
        weights = torch.softmax(logits.gather(1, ids), -1)
    else:
        weights = scores(logits, rule).gather(1, ids)
    if rule.normalize is not None:
        weights = weights / (weights**rule.normalize).sum(1, keepdim=True) ** (1 / rule.normalize)
    return weights * rule.scale


def results(
    routing: Routing, x: Tensor, weight: Tensor, gradients: list[Tensor]
) -> dict[str, Tensor]:
    """Return a routing's weights and logits, and the gradients of x and weight.

    `gradients` are those of topk_weights [T, K] and logits [T, E].
    """
    outputs = [routing.topk_weights, routing.logits]
    dx, dweight = torch.autograd.grad(outputs, [x, weight], gradients)
    return {
        "topk_weights": outputs[0].detach(),
        "logits": outputs[1].detach(),
        "d x": dx,
        "d weight": dweight,
    }


def plain(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    rule: RoutingRule,
    gradients: list[Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the results of plain torch code in `dtype` for the experts ids [T, K]."""
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    logits = x.to(logits_dtype(dtype)) @ weight.to(logits_dtype(dtype)).T
    routing = Routing(ids, weigh(logits, ids, rule), logits)
    return results(routing, x, weight, [g.to(logits_dtype(dtype)) for g in gradients])


def _select_one(row: list[float], rule: RoutingRule, top_k: int) -> list[int]:
    """Return the experts of one token for its scores `row`."""
    size = len(row) // rule.num_groups
    groups = [row[g * size : (g + 1) * size] for g in range(rule.num_groups)]
    best = 2 if rule.group_score == "top2" else 1
    value = [sum(sorted(group, reverse=True)[:best]) for group in groups]
    kept = sorted(range(rule.num_groups), key=lambda g: (-value[g], g))[: rule.groups_kept]
    allowed = [e for e in range(len(row)) if e // size in kept]
    return sorted(allowed, key=lambda e: (-row[e], e))[:top_k]
