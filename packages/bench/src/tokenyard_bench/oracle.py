"""Check a layer's results against float64, on a sample of its tokens and experts.

A token's output and input gradient depend on that token alone, and an expert's weight gradient on
the rows routed to it. So the sample is checked exactly and at the layer's full size, at a fraction
of its cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.activations import activate
from tokenyard.tolerance import allowed_error, relative_error
from tokenyard_bench.case import Case
from tokenyard_bench.entrant import Entrant

_TOKENS = 128
_EXPERTS = 2

Results = dict[str, Tensor]


class Verdict(NamedTuple):
    """The worst error among output, d x, d up and d down."""

    error: float  # relative to float64, by Frobenius norm
    allowed: float  # twice the error of plain torch code in the same dtype, plus eps
    worst: str  # name of the result


def judge(case: Case, entrant: Entrant) -> Verdict:
    """Run an entrant forward and backward, and compare a sample of its results."""
    y, ids, dx, dup, ddown = entrant.results(case)
    tokens = sampled_tokens(case.x.shape[0], y.device)
    experts = sampled_experts(ids, case.workload.num_experts)
    results = {
        "y": y[tokens],
        "d x": dx[tokens],
        "d up": dup[experts],
        "d down": ddown[experts],
    }
    # A layer may be so large that the references need the memory of its results.
    del y, dx, dup, ddown
    return judge_sample(case, ids, tokens, experts, results)


def judge_sample(
    case: Case, ids: Tensor, tokens: Tensor, experts: list[int], results: Results
) -> Verdict:
    """Compare results of some tokens and experts of a case with float64. ids [T, K]."""
    dtype = case.workload.dtype
    plain = _reference(case, ids, tokens, experts, dtype)
    exact = _reference(case, ids, tokens, experts, torch.float64)
    verdicts = [
        Verdict(relative_error(results[name], want), allowed_error(plain[name], want, dtype), name)
        for name, want in exact.items()
    ]
    return max(verdicts, key=lambda verdict: verdict.error / verdict.allowed)


def sampled_tokens(count: int, device: torch.device) -> Tensor:
    """Return the indices of a random sample of tokens."""
    return torch.randperm(count, device=device)[:_TOKENS]


def sampled_experts(ids: Tensor, num_experts: int) -> list[int]:
    """Return the busiest and the least busy expert, where skew causes errors first."""
    counts = torch.bincount(ids.flatten().long(), minlength=num_experts)[:num_experts]
    order = counts.argsort(descending=True).tolist()
    return sorted({order[0], order[-1]})[:_EXPERTS]


def _reference(
    case: Case, ids: Tensor, tokens: Tensor, experts: list[int], dtype: torch.dtype
) -> Results:
    """Compute the sampled results by definition in a dtype, for the layer's own ids [T, K]."""
    x = case.x.detach()[tokens].to(dtype).requires_grad_()
    gates = _gates(case, x, ids[tokens], tokens)
    inputs = {"d x": x}
    if case.topk_weights is not None:
        inputs["d weights"] = gates.requires_grad_()
    y = _layer(case, x, ids[tokens], gates, dtype)
    gradients = torch.autograd.grad(y, tuple(inputs.values()), case.dy[tokens].to(dtype))
    ups, downs = zip(*(_weight_gradients(case, ids, expert, dtype) for expert in experts))
    results = {"y": y.detach(), "d up": torch.stack(ups), "d down": torch.stack(downs)}
    return results | dict(zip(inputs, gradients))


def _layer(case: Case, x: Tensor, ids: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.zeros(x.shape, dtype=gates.dtype, device=x.device)
    for expert in range(case.workload.num_experts):
        token, k = (ids == expert).nonzero(as_tuple=True)
        if len(token):
            up = case.up[expert].detach().to(dtype)
            down = case.down[expert].detach().to(dtype)
            rows = _expert(case, x[token], up, down)
            y = y.index_add(0, token, gates[token, k].unsqueeze(1) * rows.to(gates.dtype))
    return y.to(dtype)


def _weight_gradients(
    case: Case, ids: Tensor, expert: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    token, k = (ids == expert).nonzero(as_tuple=True)
    x = case.x.detach()[token].to(dtype)
    up = case.up[expert].detach().to(dtype).requires_grad_()
    down = case.down[expert].detach().to(dtype).requires_grad_()
    gates = _gates(case, x, ids[token], token).gather(1, k.unsqueeze(1))
    rows = _expert(case, x, up, down)
    dup, ddown = torch.autograd.grad(rows, (up, down), (gates * case.dy[token]).to(dtype))
    return dup, ddown


def _expert(case: Case, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(activate(F.linear(x, up), case.workload.activation), down)


def _gates(case: Case, x: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """Return the routing weights [S, K] of the tokens x [S, D], in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if case.topk_weights is not None:
        return case.topk_weights.detach()[tokens].to(wide)
    scores = F.linear(x.to(wide), case.router.detach().to(wide)).softmax(-1).gather(1, ids.long())
    return scores / scores.sum(1, keepdim=True)
