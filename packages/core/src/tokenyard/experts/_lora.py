"""Experts with low-rank adapters, as one operator: beside each frozen matmul a low-rank one.

The equations are those of the `torch` kernel, with W x + s B (A x) in place of W x. The forward
pass saves x and the pre-activation only. The backward pass computes no gradient of a frozen
weight. Grouped matmuls over sorted rows do all of it, the low-rank ones too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.activations import activate
from tokenyard.adapter import LoraAdapter
from tokenyard.experts._grouped_matmuls import add_bias, rows_times
from tokenyard.experts._lora_backward import backward
from tokenyard.experts._lora_call import LoraCall
from tokenyard.experts._lora_op import register_lora_op
from tokenyard.experts._weights import local_weight
from tokenyard.interfaces import ExpertWeights, LowRank, Plan
from tokenyard.permutations._moves import to_rows, to_tokens

_ALIGNED = 8  # grouped matmuls of bfloat16 on a GPU take ranks that are multiples of this


def low_rank_of(adapter: LoraAdapter, x: Tensor, plan: Plan, weights: ExpertWeights) -> LowRank:
    """Return the matrices of an adapter in the dtype of x [T, D]; in training, draw its dropout."""
    matrices: dict[str, Tensor | None] = dict.fromkeys(("up_a", "up_b", "down_a", "down_b"))
    for target in adapter.targets:
        a, b = (local_weight(matrix, x.dtype) for matrix in adapter.matrices(target))
        matrices[f"{target}_a"] = a
        matrices[f"{target}_b"] = b
    dropped: Tensor | None = None  # [T, D]
    mask: Tensor | None = None  # [R, F]
    scale = adapter.scale
    down_scale = scale
    if adapter.training and adapter.settings.dropout:
        if matrices["up_a"] is not None:
            dropped = adapter.dropped(x)
        if matrices["down_a"] is not None:
            kept = 1 - adapter.settings.dropout
            shape = (plan.order.shape[0], weights.down.shape[2])
            mask = x.new_empty(shape, dtype=torch.bool).bernoulli_(kept)
            # 1 / kept would be rounded in a mask of 16 bits.
            down_scale = scale / kept
    return LowRank(**matrices, dropped=dropped, mask=mask, up_scale=scale, down_scale=down_scale)


def lora_experts(
    x: Tensor,
    plan: Plan,
    topk_weights: Tensor | None,
    weights: ExpertWeights,
    low_rank: LowRank,
    activation: str,
) -> Tensor:
    """Return y [T, D] for unsorted tokens x [T, D]: experts with their adapters."""
    matrices = low_rank._asdict()
    for target in ("up", "down"):
        a, b = matrices[f"{target}_a"], matrices[f"{target}_b"]
        padding = -a.shape[1] % _ALIGNED if a is not None and a.is_cuda else 0
        if padding:
            matrices[f"{target}_a"] = F.pad(a, (0, 0, 0, padding))
            matrices[f"{target}_b"] = F.pad(b, (0, padding))
    return _lora_experts(x, plan, topk_weights, weights, LowRank(**matrices), activation)


def _forward(call: LoraCall) -> tuple[Tensor, Tensor]:
    """Return y [T, D] and the pre-activation z [R, 2F or F]."""
    plan = call.plan
    up, down, up_bias, down_bias = call.weights
    x_rows = to_rows(call.x, plan)  # [R, D]
    z = add_bias(rows_times(x_rows, up.mT, plan.offsets), up_bias, plan.offsets)  # [R, 2F or F]
    if call.up is not None:
        call.up.add(z, x_rows if call.dropped is None else to_rows(call.dropped, plan))
    del x_rows  # free them before the next allocation
    a = activate(z, call.activation)  # [R, F]
    rows = add_bias(rows_times(a, down.mT, plan.offsets), down_bias, plan.offsets)  # [R, D]
    if call.down is not None:
        call.down.add(rows, call.masked(a))
    return to_tokens(rows, plan, call.topk_weights), z


def _saved(call: LoraCall) -> tuple[Tensor]:
    return (call.x.new_empty(call.plan.order.shape[0], call.weights.up.shape[1]),)


_lora_experts = register_lora_op("tokenyard::lora_experts", _forward, backward, _saved, 1, [])
