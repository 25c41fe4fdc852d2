"""What routing costs, work by work: choosing experts, planning, and moving rows, forward and backward.

Each backend's results are compared with core's `torch` in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard import Plan
from tokenyard.permutations import TorchPermutation
from tokenyard.routers import TopKRouter
from tokenyard.tolerance import allowed_error, relative_error
from tokenyard_bench.case import Case


class Work(NamedTuple):
    """One work of one backend."""

    call: Callable[[], object]
    bytes: int  # that it reads and writes at least


class Moved(NamedTuple):
    """A plan, and what moves by it."""

    plan: Plan
    x: Tensor  # [T, D]
    rows: Tensor  # [R, D]
    weights: Tensor  # [T, K] float32
    dy: Tensor  # [T, D]
    drows: Tensor  # [R, D]


def moved_of(case: Case) -> Moved:
    """Return a plan of a case's own routing, and random tensors to move by it."""
    with torch.no_grad():
        router = _router(TopKRouter, case)
        routing = router(case.x, case.topk_ids)
        plan = TorchPermutation(case.workload).plan(routing.topk_ids, case.workload.num_experts)
        rows = TorchPermutation(case.workload).permute(case.x, plan)
    return Moved(plan, case.x.detach(), rows, routing.topk_weights, case.dy, torch.randn_like(rows))


def permutation_works(
    permutation: Any, moved: Moved, case: Case
) -> tuple[dict[str, Work], str | None]:
    """Return the works of a permutation, and what is wrong with their results, if anything is."""
    plan, experts = moved.plan, case.workload.num_experts
    ids = _ids(plan, experts)
    x, rows, weights = (t.clone().requires_grad_() for t in (moved.x, moved.rows, moved.weights))
    there, back = permutation.permute(x, plan), permutation.unpermute(rows, plan, weights)
    token, row, slots = moved.x.nbytes, moved.rows.nbytes, 4 * ids.numel()  # bytes
    works = {
        "plan": Work(lambda: permutation.plan(ids, experts), 3 * slots),
        "permute": Work(_no_grad(lambda: permutation.permute(moved.x, plan)), token + row),
        "permute backward": Work(_gradient(there, (x,), moved.drows), token + row),
        "unpermute": Work(
            _no_grad(lambda: permutation.unpermute(moved.rows, plan, moved.weights)), token + row
        ),
        "unpermute backward": Work(_gradient(back, (rows, weights), moved.dy), token + 2 * row),
    }
    plain, exact = (
        _moved(TorchPermutation(case.workload), _as(moved, d)) for d in (x.dtype, torch.float64)
    )
    wrong = _wrong(_moved(permutation, moved), plain, exact)
    return works, wrong or _wrong_plan(permutation.plan(ids, experts), plan)


def router_works(router: type, case: Case) -> tuple[dict[str, Work], str | None]:
    """Return the works of a router, and what is wrong with their results, if anything is."""
    own, k = _router(router, case), case.workload.top_k
    x, weight = case.x, own.weight
    with torch.no_grad():
        logits = own.logits(x)
    given = logits.clone().requires_grad_()
    weights = own.choose(given, None)[1]
    routed = own(x).topk_weights
    dweights = torch.randn_like(weights)
    scores, chosen = logits.nbytes, 8 * logits.shape[0] * k  # bytes
    works = {
        "router": Work(_no_grad(lambda: own(x)), x.nbytes + weight.nbytes + scores + chosen),
        "router backward": Work(
            _gradient(routed, (x, weight), dweights), 2 * x.nbytes + 2 * weight.nbytes + scores
        ),
        "choose": Work(_no_grad(lambda: own.choose(logits, None)), scores + chosen),
        "choose backward": Work(_gradient(weights, (given,), dweights), 2 * scores + chosen),
    }
    return works, _wrong_choice(own, _router(TopKRouter, case), logits, dweights)


def _router(router: type, case: Case) -> Any:
    with torch.device("meta"):
        own: Any = router(case.workload)
    own.weight = case.router
    return own


def _gradient(y: Tensor, of: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(y, of, dy, retain_graph=True)


def _no_grad(call: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(call)


def _ids(plan: Plan, experts: int) -> Tensor:
    """Return the ids [T, K] that a plan was made of."""
    expert = torch.searchsorted(plan.offsets[1:], plan.inverse, right=True, out_int32=True)
    return expert.view(-1, plan.top_k).clamp(max=experts)


def _as(moved: Moved, dtype: torch.dtype) -> Moved:
    wide = torch.promote_types(dtype, torch.float32)
    x, rows, dy, drows = (t.to(dtype) for t in (moved.x, moved.rows, moved.dy, moved.drows))
    return Moved(moved.plan, x, rows, moved.weights.to(wide), dy, drows)


def _moved(permutation: Any, moved: Moved) -> dict[str, Tensor]:
    x, rows, weights = (t.clone().requires_grad_() for t in (moved.x, moved.rows, moved.weights))
    there, back = (
        permutation.permute(x, moved.plan),
        permutation.unpermute(rows, moved.plan, weights),
    )
    (dx,) = torch.autograd.grad(there, x, moved.drows)
    drows, dweights = torch.autograd.grad(back, (rows, weights), moved.dy)
    return {
        "rows": there.detach(),
        "y": back.detach(),
        "d x": dx,
        "d rows": drows,
        "d weights": dweights,
    }


def _wrong(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> str | None:
    for name, want in exact.items():
        error, allowed = relative_error(got[name], want), allowed_error(plain[name], want)
        if error > allowed:
            return f"{name} is off by {error:.2e} from float64, and {allowed:.2e} is allowed"
    return None


def _wrong_plan(got: Plan, want: Plan) -> str | None:
    same = all(torch.equal(a, b) for a, b in zip(got[:3], want[:3]))
    return None if same else "the plan is not the stable sort"


def _wrong_choice(own: Any, plain: Any, logits: Tensor, dweights: Tensor) -> str | None:
    """The weights of an own choice; and weights and gradients of the ids that were chosen, whatever they are."""
    ids = own.choose(logits, None)[0]

    def results(router: Any, logits: Tensor) -> dict[str, Tensor]:
        leaf = logits.clone().requires_grad_()
        best, weights = router.choose(leaf, None)[1], router.choose(leaf, ids)[1]
        (dlogits,) = torch.autograd.grad(weights, leaf, dweights.to(weights.dtype))
        return {"best weights": best.detach(), "weights": weights.detach(), "d logits": dlogits}

    return _wrong(results(own, logits), results(plain, logits), results(plain, logits.double()))
