"""The timed calls of routers and permutations: choose, plan and move, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard.permutations import TorchPermutation
from tokenyard.routers import TopKRouter
from tokenyard_bench.case import Case
from tokenyard_bench.routing_check import PlannedRows, wrong_permutation, wrong_router


class Timed(NamedTuple):
    """One call of one backend."""

    call: Callable[[], object]
    bytes: int  # the least that it must read and write


def plan_rows(case: Case) -> PlannedRows:
    """Return the plan of a case's routing, and random tensors to move by it."""
    permutation = TorchPermutation(case.workload)
    with torch.no_grad():
        routing = _router(TopKRouter, case)(case.x, case.topk_ids)
        plan = permutation.plan(routing.topk_ids, case.workload.num_experts)
        rows = permutation.permute(case.x, plan)
    x = case.x.detach()
    return PlannedRows(plan, x, rows, routing.topk_weights, case.dy, torch.randn_like(rows))


def permutation_calls(
    permutation: Any, planned: PlannedRows, case: Case
) -> tuple[dict[str, Timed], str | None]:
    """Return the calls of a permutation, and the fault of their results, if there is one."""
    plan = planned.plan
    experts = case.workload.num_experts
    ids = planned.ids(experts)
    x, rows, weights = planned.leaves()
    permuted = permutation.permute(x, plan)
    unpermuted = permutation.unpermute(rows, plan, weights)
    x_bytes = planned.x.nbytes
    rows_bytes = planned.rows.nbytes
    calls = {
        "plan": Timed(lambda: permutation.plan(ids, experts), 3 * 4 * ids.numel()),
        "permute": Timed(
            _no_grad(lambda: permutation.permute(planned.x, plan)), x_bytes + rows_bytes
        ),
        "permute backward": Timed(_gradient(permuted, (x,), planned.drows), x_bytes + rows_bytes),
        "unpermute": Timed(
            _no_grad(lambda: permutation.unpermute(planned.rows, plan, planned.weights)),
            x_bytes + rows_bytes,
        ),
        "unpermute backward": Timed(
            _gradient(unpermuted, (rows, weights), planned.dy), x_bytes + 2 * rows_bytes
        ),
    }
    return calls, wrong_permutation(permutation, planned, case)


def router_calls(cls: type, case: Case) -> tuple[dict[str, Timed], str | None]:
    """Return the calls of a router class, and the fault of their results, if there is one."""
    router = _router(cls, case)
    x = case.x
    weight = router.weight
    with torch.no_grad():
        logits = router.logits(x)
    leaf = logits.clone().requires_grad_()
    weights = router.choose(leaf, None)[1]
    routed = router(x).topk_weights
    dweights = torch.randn_like(weights)
    operands = x.nbytes + weight.nbytes
    scores = logits.nbytes
    chosen = 8 * weights.numel()  # ids and weights, 4 bytes each
    calls = {
        "router": Timed(_no_grad(lambda: router(x)), operands + scores + chosen),
        "router backward": Timed(_gradient(routed, (x, weight), dweights), 2 * operands + scores),
        "choose": Timed(_no_grad(lambda: router.choose(logits, None)), scores + chosen),
        "choose backward": Timed(_gradient(weights, (leaf,), dweights), 2 * scores + chosen),
    }
    reference = _router(TopKRouter, case)
    return calls, wrong_router(router, reference, logits, dweights)


def _router(cls: type, case: Case) -> Any:
    """Build a router with a case's weight."""
    with torch.device("meta"):
        router: Any = cls(case.workload)
    router.weight = case.router
    return router


def _gradient(y: Tensor, inputs: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def _no_grad(call: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(call)
