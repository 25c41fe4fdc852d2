"""Units of FSDP: modules whose parameters are gathered together, and their gradients summed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from tokenyard import MoE
from tokenyard_parallel.meshes import SHARD, is_shard
from tokenyard_parallel.strategies._gather import CopiedGather
from tokenyard_parallel.strategies._peers import Peers
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter
from tokenyard_parallel.strategies._shard_dim import cut_evenly_into_experts, expert_placement


class Ranks(NamedTuple):
    """The ranks that share parameters."""

    mesh: DeviceMesh  # shards, or replicas and shards
    peers: Peers | None  # those that hold the shards, if they read each other's memory

    @property
    def shards(self) -> int:
        return self.mesh[SHARD].size()

    @property
    def replicated(self) -> bool:
        return self.mesh.ndim > 1


def shard_experts(moe: MoE, ranks: Ranks, reshard: bool) -> list[CopiedGather]:
    """Make this rank's experts a unit, sharded over the ranks that hold the same ones.

    With `reshard`, FSDP frees what it gathered after the forward pass. Returns the unit's gather
    if it is by copies.
    """
    stored = _trained_dtype(moe.experts)
    computed = moe.workload.dtype
    # Experts cast their weights to the compute dtype anyway, so they are gathered in it
    gathered = computed if computed.itemsize < stored.itemsize else None
    evenly_cut = cut_evenly_into_experts(moe.experts, ranks.shards)
    placement = expert_placement(ranks.shards)
    unit = shard_module(moe.experts, ranks, reshard, gathered, placement)
    if ranks.peers is None:
        return []
    return [CopiedGather(unit, evenly_cut, ranks.peers, gathered)]


def shard_module(
    module: nn.Module,
    ranks: Ranks,
    reshard: bool,
    gathered: torch.dtype | None = None,
    placement: Callable[[nn.Parameter], Shard] | None = None,
    ignored: set[nn.Parameter] | None = None,
) -> Any:
    """Make a module a unit, and return it. Its parameters are gathered in `gathered`, if given.

    `placement` says along which dimension a parameter is sharded, by default the first. `ignored`
    parameters are not sharded.
    """
    stored = _trained_dtype(module)
    # The weights may become 16-bit later; replicas sum gradients in today's dtype
    summed = stored if ranks.replicated and gathered is None else gathered
    unit: Any = fully_shard(
        module,
        mesh=ranks.mesh,
        reshard_after_forward=reshard,
        shard_placement_fn=placement,
        mp_policy=MixedPrecisionPolicy(gathered, summed, cast_forward_inputs=False),
        ignored_params=ignored,
    )
    if gathered is not None or not ranks.replicated:
        sum_dtype = None
        if gathered is not None:
            sum_dtype = partial(_stored_dtype, unit, stored, ranks.replicated)
        unit.set_custom_reduce_scatter(WideReduceScatter(ranks.shards, ranks.peers, sum_dtype))
    # on one rank torch would copy the gradients to divide them by 1
    if ranks.mesh.size() > 1:
        unit.set_gradient_divide_factor(1.0)
    # gloo has no scaled sum; without this, two factors would apply
    unit.set_force_sum_reduction_for_comms(True)
    return unit


def _trained_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the parameters that are trained; without any, of the frozen ones."""
    parameters = sorted(module.parameters(), key=lambda p: not p.requires_grad)
    return parameters[0].dtype


def _stored_dtype(unit: nn.Module, before: torch.dtype, replicated: bool) -> torch.dtype:
    """Return the dtype in which the shards of a unit are stored: `before`, or what it has become.

    Replicas sum what ranks have summed, so they keep the wider one.
    """
    if replicated:
        return before
    stored = (p.dtype for p in unit.parameters() if p.requires_grad and is_shard(p))
    return next(stored, before)
