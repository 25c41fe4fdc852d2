"""Whether a layer computes what it should: compared with float64 on some of its tokens and experts.

Output and input gradient of a token depend on that token alone, an expert's weight gradient on the rows routed to it.
So a sample of both is checked exactly, at the full size of the layer, at a small part of its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import Routing
from tokenyard.activations import activate
from tokenyard.tolerance import allowed_error, relative_error
from tokenyard_bench.case import Case

_TOKENS = 128
_EXPERTS = 2


class Verdict(NamedTuple):
    """How far a layer is from float64, and how far it may be; the worst of output, d x, d up and d down."""

    error: float  # relative, by Frobenius norm
    allowed: float  # twice what plain torch code in the same dtype makes of it, plus eps
    worst: str  # which result that was


Results = dict[str, Tensor]


def judge(case: Case, layer: Callable[[], tuple[Tensor, Routing]]) -> Verdict:
    """Run a layer forward and backward and compare a sample of its results."""
    y, routing = layer()
    dx, _, dup, ddown = torch.autograd.grad(y, case.leaves(), case.dy)
    routing = Routing(*(t.detach() for t in routing))
    tokens = torch.randperm(case.x.shape[0], device=y.device)[:_TOKENS]
    experts = _sampled_experts(routing.topk_ids, case.workload.num_experts)
    got = {
        "y": y.detach()[tokens],
        "d x": dx[tokens],
        "d up": dup[experts],
        "d down": ddown[experts],
    }
    del y, dx, dup, ddown
    plain = _sample(case, routing.topk_ids, tokens, experts, case.workload.dtype)
    exact = _sample(case, routing.topk_ids, tokens, experts, torch.float64)
    verdicts = [
        Verdict(relative_error(got[name], want), allowed_error(plain[name], want), name)
        for name, want in exact.items()
    ]
    return max(verdicts, key=lambda v: v.error / v.allowed)


def _sampled_experts(ids: Tensor, num_experts: int) -> list[int]:
    """Take the busiest expert and the idlest: skew goes wrong at the ends."""
    counts = torch.bincount(ids.flatten().long(), minlength=num_experts)[:num_experts]
    order = counts.argsort(descending=True).tolist()
    return sorted({order[0], order[-1]})[:_EXPERTS]


def _sample(
    case: Case, ids: Tensor, tokens: Tensor, experts: list[int], dtype: torch.dtype
) -> Results:
    """Compute the sampled results by the definition, in a dtype; the ids are taken as given."""
    x = case.x.detach()[tokens].to(dtype).requires_grad_()
    y = _layer(case, x, ids[tokens], dtype)
    (dx,) = torch.autograd.grad(y, x, case.dy[tokens].to(dtype))
    ups, downs = zip(*(_weight_gradients(case, ids, e, dtype) for e in experts))
    return {"y": y.detach(), "d x": dx, "d up": torch.stack(ups), "d down": torch.stack(downs)}


def _layer(case: Case, x: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    gates = _gates(case, x, ids)
    y = torch.zeros(x.shape, dtype=gates.dtype, device=x.device)
    for e in range(case.workload.num_experts):
        token, k = (ids == e).nonzero(as_tuple=True)
        if len(token):
            row = _expert(
                case, x[token], case.up[e].detach().to(dtype), case.down[e].detach().to(dtype)
            )
            y = y.index_add(0, token, gates[token, k].unsqueeze(1) * row.to(gates.dtype))
    return y.to(dtype)


def _weight_gradients(case: Case, ids: Tensor, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    token, k = (ids == e).nonzero(as_tuple=True)
    x = case.x.detach()[token].to(dtype)
    up, down = (w[e].detach().to(dtype).requires_grad_() for w in (case.up, case.down))
    gates = _gates(case, x, ids[token]).gather(1, k.unsqueeze(1))
    row = _expert(case, x, up, down)
    dup, ddown = torch.autograd.grad(row, (up, down), (gates * case.dy[token]).to(dtype))
    return dup, ddown


def _expert(case: Case, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(activate(F.linear(x, up), case.workload.activation), down)


def _gates(case: Case, x: Tensor, ids: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = F.linear(x.to(wide), case.router.detach().to(wide)).softmax(-1).gather(1, ids.long())
    return scores / scores.sum(1, keepdim=True)
