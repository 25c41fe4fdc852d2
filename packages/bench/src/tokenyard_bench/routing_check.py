"""Check routers and permutations against core's `torch` backends in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard import Plan
from tokenyard.permutations import TorchPermutation
from tokenyard.tolerance import allowed_error, relative_error
from tokenyard_bench.case import Case


class PlannedRows(NamedTuple):
    """A plan, and the tensors that move by it."""

    plan: Plan
    x: Tensor  # [T, D]
    rows: Tensor  # [R, D]
    weights: Tensor  # [T, K], at least float32
    dy: Tensor  # [T, D]
    drows: Tensor  # [R, D]

    def ids(self, num_experts: int) -> Tensor:
        """Return the ids [T, K] that the plan was made from."""
        plan = self.plan
        expert = torch.searchsorted(plan.offsets[1:], plan.inverse, right=True, out_int32=True)
        return expert.view(-1, plan.top_k).clamp(max=num_experts)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of x, rows and weights that require grad."""
        x, rows, weights = (t.clone().requires_grad_() for t in (self.x, self.rows, self.weights))
        return x, rows, weights

    def to(self, dtype: torch.dtype) -> PlannedRows:
        """Convert all tensors to a dtype, the weights to at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        x, rows, dy, drows = (t.to(dtype) for t in (self.x, self.rows, self.dy, self.drows))
        return PlannedRows(self.plan, x, rows, self.weights.to(wide), dy, drows)


def wrong_permutation(permutation: Any, planned: PlannedRows, case: Case) -> str | None:
    """Return the fault of a permutation as a sentence, or None."""
    reference = TorchPermutation(case.workload)
    plain = _moves(reference, planned.to(planned.x.dtype))
    exact = _moves(reference, planned.to(torch.float64))
    fault = _fault(_moves(permutation, planned), plain, exact)
    if fault is not None:
        return fault
    experts = case.workload.num_experts
    plan = permutation.plan(planned.ids(experts), experts)
    same = all(torch.equal(a, b) for a, b in zip(plan[:3], planned.plan[:3]))
    return None if same else "the plan is not the stable sort"


def _moves(permutation: Any, planned: PlannedRows) -> dict[str, Tensor]:
    """Return the results and gradients of permute and unpermute."""
    x, rows, weights = planned.leaves()
    permuted = permutation.permute(x, planned.plan)
    unpermuted = permutation.unpermute(rows, planned.plan, weights)
    (dx,) = torch.autograd.grad(permuted, x, planned.drows)
    drows, dweights = torch.autograd.grad(unpermuted, (rows, weights), planned.dy)
    return {
        "rows": permuted.detach(),
        "y": unpermuted.detach(),
        "d x": dx,
        "d rows": drows,
        "d weights": dweights,
    }


def wrong_router(router: Any, reference: Any, logits: Tensor, dweights: Tensor) -> str | None:
    """Return the fault of a router's choice as a sentence, or None.

    Compares the weights of its own choice, and the weights and gradients for its ids.
    """
    ids = router.choose(logits, None)[0]
    plain = _choices(reference, logits, ids, dweights)
    exact = _choices(reference, logits.double(), ids, dweights)
    return _fault(_choices(router, logits, ids, dweights), plain, exact)


def _choices(router: Any, logits: Tensor, ids: Tensor, dweights: Tensor) -> dict[str, Tensor]:
    leaf = logits.clone().requires_grad_()
    best = router.choose(leaf, None)[1]
    weights = router.choose(leaf, ids)[1]
    (dlogits,) = torch.autograd.grad(weights, leaf, dweights.to(weights.dtype))
    return {"best weights": best.detach(), "weights": weights.detach(), "d logits": dlogits}


def _fault(
    results: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> str | None:
    """Compare results with those of core in the same dtype (`plain`) and in float64 (`exact`)."""
    for name, want in exact.items():
        error = relative_error(results[name], want)
        allowed = allowed_error(plain[name], want)
        if error > allowed:
            return f"{name} is off by {error:.2e} from float64, and {allowed:.2e} is allowed"
    return None
