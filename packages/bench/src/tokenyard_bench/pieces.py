"""The pieces of a layer, each on its own, on the data that the layer would give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import MoE
from tokenyard.activations import activate, activate_with_pullback
from tokenyard.experts import rows_outer, rows_times
from tokenyard_bench.case import Case
from tokenyard_bench.dense import DenseProducts


class Piece(NamedTuple):
    """One part of a layer's work, and the same work at its best, where there is a measure of it."""

    call: Callable[[], object]
    ceiling: Callable[[], object] | None  # a dense product, or a copy of as many bytes
    named: str  # what the ceiling is


def build_pieces(case: Case, moe: MoE, dense: DenseProducts) -> dict[str, Piece]:
    """Return the pieces of forward and backward in their order: routing, plan, moves, six products, activation."""
    with torch.no_grad():
        routing = moe.router(case.x, case.topk_ids)
        permutation = moe.experts.permutation
        plan = permutation.plan(routing.topk_ids, case.workload.num_experts)
        rows = permutation.permute(case.x, plan)
        z = rows_times(rows, case.up.detach().mT, plan.offsets)
        a = activate(z, case.workload.activation)
        out = rows_times(a, case.down.detach().mT, plan.offsets)
        da = rows_times(rows, case.down.detach(), plan.offsets)
    weights = routing.topk_weights

    def no_grad(call: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(call)

    moved = _copy_like(rows)
    pieces = {
        "router": Piece(
            lambda: moe.router(case.x, case.topk_ids),
            lambda: F.linear(case.x, case.router),
            "logits",
        ),
        "plan": Piece(
            lambda: permutation.plan(routing.topk_ids, case.workload.num_experts), None, ""
        ),
        "permute": Piece(lambda: permutation.permute(case.x, plan), moved, "copy of the rows"),
        "up": _product(lambda: rows_times(rows, case.up.mT, plan.offsets), dense, "up"),
        "activation": Piece(lambda: activate(z, case.workload.activation), None, ""),
        "down": _product(lambda: rows_times(a, case.down.mT, plan.offsets), dense, "down"),
        "combine": Piece(
            lambda: permutation.unpermute(out, plan, weights), moved, "copy of the rows"
        ),
        "d activation": _product(
            lambda: rows_times(rows, case.down, plan.offsets), dense, "d activation"
        ),
        "activation backward": Piece(lambda: _pullback(case, z, da), None, ""),
        "d down": _product(lambda: rows_outer(rows, a, plan.offsets), dense, "d down"),
        "d input": _product(lambda: rows_times(z, case.up, plan.offsets), dense, "d input"),
        "d up": _product(lambda: rows_outer(z, rows, plan.offsets), dense, "d up"),
        "sum of d input": Piece(
            lambda: permutation.unpermute(out, plan, None), moved, "copy of the rows"
        ),
    }
    return {name: piece._replace(call=no_grad(piece.call)) for name, piece in pieces.items()}


def _product(call: Callable[[], object], dense: DenseProducts, name: str) -> Piece:
    return Piece(call, lambda: dense.product(name), "dense product")


def _copy_like(rows: Tensor) -> Callable[[], object]:
    target = torch.empty_like(rows)
    return lambda: target.copy_(rows)


def _pullback(case: Case, z: Tensor, da: Tensor) -> Tensor:
    return activate_with_pullback(z, case.workload.activation)[1](da)
