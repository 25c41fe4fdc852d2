"""Liger-Kernel's fused expert-parallel layer as a peer, for Hopper and Blackwell GPUs.

https://github.com/linkedin/Liger-Kernel. One persistent kernel sends rows, computes experts and
returns results, through NVSHMEM.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard_bench.exchange.entrant import Candidate, RankEntrant
from tokenyard_bench.exchange.rank_case import RankCase
from tokenyard_bench.oracle import Results

_MOST_SLOTS = 2**31 - 1  # Liger counts slots in int32
_TILE = 128  # and pads the slots of each expert to tiles


class Capacity(NamedTuple):
    """The largest layer of a run. Liger reserves its buffers once, and they cannot grow."""

    tokens: int  # of a rank
    dim: int
    num_experts: int
    top_k: int


def liger_candidate(case: RankCase, capacity: Capacity) -> Candidate:
    """Return Liger's layer with the weights of a case."""
    return Candidate("liger", "peer", _unusable(case, capacity), lambda: _build(case, capacity))


def _unusable(case: RankCase, capacity: Capacity) -> str | None:
    workload = case.workload
    for module in ("liger_kernel", "liger_cute_kernels"):
        if find_spec(module) is None:
            return f"{module} is not installed; see https://github.com/linkedin/Liger-Kernel"
    if workload.capability is None or workload.capability[0] not in (9, 10):
        return "Liger's fused layer is for Hopper and Blackwell GPUs"
    if workload.dtype != torch.bfloat16:
        return "Liger's fused layer computes in bf16"
    if workload.activation != "swiglu":
        return f"computes swiglu, not {workload.activation}"
    slots = capacity.tokens * capacity.top_k + _TILE * capacity.num_experts
    if slots > _MOST_SLOTS:
        return (
            f"Liger's buffer holds {_MOST_SLOTS:,} slots, and --tokens {capacity.tokens:,} "
            f"needs {slots:,}; lower --tokens"
        )
    return None


@dataclass(frozen=True)
class Liger(RankEntrant):
    """Liger's layer. The gate and the up projection are two leaves."""

    def named(self, gradients: tuple[Tensor, ...]) -> Results:
        """Return the gradients by name, those of gate and up as one."""
        dx, dweights, dgate, dup, ddown = gradients
        return super().named((dx, dweights, torch.cat((dgate, dup), 1), ddown))


def _build(case: RankCase, capacity: Capacity) -> Liger:
    _reserve(capacity, case.workload.expert_parallel)
    from liger_kernel.ops.cute.ops.moe import moe_fused

    gate, up = (half.contiguous().requires_grad_() for half in case.up.detach().chunk(2, 1))
    down = case.down.detach().requires_grad_()
    workload = case.workload

    def forward() -> Tensor:
        weights = case.topk_weights.to(workload.dtype)
        y: Tensor = moe_fused(
            case.x,
            case.topk_ids,
            weights,
            gate,
            up,
            down,
            workload.num_experts,
            workload.top_k,
        )
        return y

    return Liger(case, forward, [case.x, case.topk_weights, gate, up, down])


@functools.cache
def _reserve(capacity: Capacity, ranks: int) -> None:
    """Reserve Liger's buffers on every rank, once a process."""
    os.environ.setdefault("LIGER_KERNEL_IMPL", "cute")  # read when liger_kernel.ops is imported
    import liger_cute_kernels

    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    liger_cute_kernels.configure(
        moe=liger_cute_kernels.MoEConfig(
            max_tokens=capacity.tokens,
            hidden_size=capacity.dim,
            num_experts=capacity.num_experts,
            top_k=capacity.top_k,
            num_hosts=ranks // on_host,
            gpus_per_host=on_host,
        )
    )
