"""The pieces of a layer, each callable alone on the data that the layer would give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import MoE, Plan, Routing
from tokenyard.activations import activate, activate_with_pullback
from tokenyard.experts import rows_outer, rows_times
from tokenyard_bench.case import Case
from tokenyard_bench.dense import DenseMatmuls


class Piece(NamedTuple):
    """One piece of a layer, and a lower bound of its time, if there is one."""

    call: Callable[[], object]
    bound: Callable[[], object] | None = None  # a dense matmul, or a copy of as many bytes
    bound_name: str = ""


@dataclass(frozen=True)
class _Data:
    """The intermediate tensors of a layer."""

    routing: Routing
    plan: Plan
    rows: Tensor  # [R, D] permuted tokens
    z: Tensor  # [R, 2F or F] before the activation
    a: Tensor  # [R, F] after the activation
    out: Tensor  # [R, D] expert output
    da: Tensor  # [R, F] a gradient of a
    target: Tensor  # [R, D] memory to copy rows into


def build_pieces(case: Case, moe: MoE, dense: DenseMatmuls) -> dict[str, Piece]:
    """Return the pieces of forward and backward: routing, plan, moves, matmuls, activation.

    They are in the order of a step, and compute without autograd.
    """
    with torch.no_grad():
        data = _data(case, moe)
    pieces = {
        **_routing_pieces(case, moe, data),
        **_forward_pieces(case, moe, data, dense),
        **_backward_pieces(case, moe, data, dense),
    }
    return {
        name: piece._replace(call=torch.no_grad()(piece.call)) for name, piece in pieces.items()
    }


def _data(case: Case, moe: MoE) -> _Data:
    permutation = moe.experts.permutation
    routing = moe.router(case.x, case.topk_ids)
    plan = permutation.plan(routing.topk_ids, case.workload.num_experts)
    rows = permutation.permute(case.x, plan)
    z = rows_times(rows, case.up.detach().mT, plan.offsets)
    a = activate(z, case.workload.activation)
    out = rows_times(a, case.down.detach().mT, plan.offsets)
    da = rows_times(rows, case.down.detach(), plan.offsets)
    return _Data(routing, plan, rows, z, a, out, da, torch.empty_like(rows))


def _routing_pieces(case: Case, moe: MoE, data: _Data) -> dict[str, Piece]:
    permutation = moe.experts.permutation
    ids = data.routing.topk_ids
    return {
        "router": Piece(
            lambda: moe.router(case.x, case.topk_ids),
            lambda: F.linear(case.x, case.router),
            "logits",
        ),
        "plan": Piece(lambda: permutation.plan(ids, case.workload.num_experts)),
        "permute": _move(lambda: permutation.permute(case.x, data.plan), data),
    }


def _forward_pieces(case: Case, moe: MoE, data: _Data, dense: DenseMatmuls) -> dict[str, Piece]:
    permutation = moe.experts.permutation
    plan = data.plan
    weights = data.routing.topk_weights
    return {
        "up": _matmul(lambda: rows_times(data.rows, case.up.mT, plan.offsets), dense, "up"),
        "activation": Piece(lambda: activate(data.z, case.workload.activation)),
        "down": _matmul(lambda: rows_times(data.a, case.down.mT, plan.offsets), dense, "down"),
        "combine": _move(lambda: permutation.unpermute(data.out, plan, weights), data),
    }


def _backward_pieces(case: Case, moe: MoE, data: _Data, dense: DenseMatmuls) -> dict[str, Piece]:
    permutation = moe.experts.permutation
    rows = data.rows
    offsets = data.plan.offsets
    return {
        "d activation": _matmul(
            lambda: rows_times(rows, case.down, offsets), dense, "d activation"
        ),
        "activation backward": Piece(lambda: _pullback(case, data.z, data.da)),
        "d down": _matmul(lambda: rows_outer(rows, data.a, offsets), dense, "d down"),
        "d input": _matmul(lambda: rows_times(data.z, case.up, offsets), dense, "d input"),
        "d up": _matmul(lambda: rows_outer(data.z, rows, offsets), dense, "d up"),
        "sum of d input": _move(lambda: permutation.unpermute(data.out, data.plan, None), data),
    }


def _matmul(call: Callable[[], object], dense: DenseMatmuls, name: str) -> Piece:
    return Piece(call, lambda: dense.matmul(name), "dense matmul")


def _move(call: Callable[[], object], data: _Data) -> Piece:
    return Piece(call, lambda: data.target.copy_(data.rows), "copy of the rows")


def _pullback(case: Case, z: Tensor, da: Tensor) -> Tensor:
    return activate_with_pullback(z, case.workload.activation)[1](da)
