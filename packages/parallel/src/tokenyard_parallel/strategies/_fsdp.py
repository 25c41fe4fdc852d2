"""The strategy `fsdp`: torch's FSDP2, with the experts of each layer as a nested unit.

The loss of a rank is its part of a sum over all ranks. So gradients are summed and never averaged,
and experts, whose gradients include the tokens of other ranks, need no special case. The exchange
runs inside the experts' unit: an FSDP collective between its two all-to-alls could deadlock the
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tokenyard import ConfigError, MoE, ShardingReport, moe_layers, started_processes
from tokenyard.errors import one_of
from tokenyard_parallel.meshes import (
    EXPERT_PARALLEL,
    SHARD,
    MeshSizes,
    data_mesh,
    dense_sizes,
    expert_sizes,
    is_shard,
    make_mesh,
    rank_and_size,
)
from tokenyard_parallel.processes import connect
from tokenyard_parallel.strategies._gather import CopiedGather, attach_before_forward
from tokenyard_parallel.strategies._norm import gradient_norm
from tokenyard_parallel.strategies._peers import TRANSFERS, Ranks, peers_of
from tokenyard_parallel.strategies._prefetch import set_prefetch
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter
from tokenyard_parallel.strategies._shard_dim import (
    check_shardable,
    cut_evenly_into_experts,
    expert_placement,
)
from tokenyard_parallel.strategies._working_set import working_set

_MOST_SECONDS = 10_000_000


class FsdpStrategy:
    """Shards parameters, gradients and optimizer states over the ranks of each replica.

    `replicate` is the number of replicas (HSDP). `reshard_after_forward` frees the parameters of
    every block but the last between its forward and backward pass. `timeout` is how many seconds a
    collective may take. `transfers` moves experts and gradients by copies or collectives; auto
    selects copies if all GPUs that shard a replica read each other's memory. Neighbouring ranks
    hold different experts, as `expert_parallel` of the model says. The constructor initializes the
    default process group.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        replicate: int = 1,
        reshard_after_forward: bool = True,
        timeout: float = 600.0,
        transfers: str = "auto",
    ):
        self.device = torch.device(device)
        self.dense = dense_sizes(started_processes(), replicate)
        self.reshard_after_forward = reshard_after_forward
        self.timeout = _collective_timeout(timeout)
        one_of("parallel.strategy.transfers", transfers, TRANSFERS)
        self.transfers = transfers
        connect(self.device, self.timeout)
        self.data = rank_and_size()

    def unusable(self, model: nn.Module) -> str | None:
        """Return why the experts cannot be sharded over the ranks, and what would work."""
        try:
            sizes = self._expert_sizes(model)
            for moe in moe_layers(model):
                check_shardable(moe, self.dense, sizes)
        except ConfigError as error:
            return str(error)
        return None

    def layout(self, model: nn.Module) -> nn.Module:
        """Shard a model on the meta device, and install exchanges."""
        dense = self._ranks(make_mesh(self.dense, self.device, self.timeout))
        blocks = list(getattr(model, "blocks", ()))
        # the backward pass starts with the last block, so it stays gathered
        last = set(blocks[-1].modules()) if blocks else set()
        unsharded: set[nn.Parameter] = set()
        gathers: list[CopiedGather] = []
        if layers := moe_layers(model):
            sizes = self._expert_sizes(model)
            mesh = make_mesh(sizes, self.device, self.timeout)
            ranks = dense if sizes == self.dense else self._ranks(mesh)
            for moe in layers:
                if moe.workload.expert_parallel > 1:
                    keep_local_experts(moe, mesh)
                if 1 < moe.workload.expert_parallel == mesh.size():
                    # no other rank has these experts, so a unit would only copy them
                    unsharded.update(moe.experts.parameters())
                else:
                    gathers += self._shard_experts(moe, ranks, moe not in last)
        for block in blocks:
            self._shard(block, dense, block not in last, ignored=unsharded)
        self._shard(model, dense, False, ignored=unsharded)
        attach_before_forward(model, gathers)
        set_prefetch(model, blocks)
        model.register_forward_hook(_reshard_without_backward)
        return model

    def describe(self, model: nn.Module) -> ShardingReport:
        """Report the mesh sizes, and the peak bytes of gathered parameters."""
        meshes = {"all but experts": self.dense._asdict()}
        if moe_layers(model):
            meshes["experts"] = self._expert_sizes(model)._asdict()
        return ShardingReport(meshes, working_set(model, self.reshard_after_forward))

    def reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """Return the norm of all gradients over all ranks."""
        return gradient_norm(model)

    def _expert_sizes(self, model: nn.Module) -> MeshSizes:
        degrees = {moe.workload.expert_parallel for moe in moe_layers(model)} or {1}
        return expert_sizes(self.dense, max(degrees))

    def _ranks(self, mesh: DeviceMesh) -> Ranks:
        peers = peers_of(self.transfers, self.device, mesh[SHARD].get_group())
        return Ranks(data_mesh(mesh), peers)

    def _shard_experts(self, moe: MoE, ranks: Ranks, reshard: bool) -> list[CopiedGather]:
        """Shard this rank's experts over the ranks that hold the same ones."""
        stored = _trained_dtype(moe.experts)
        computed = moe.workload.dtype
        # Experts cast their weights to the compute dtype anyway, so they are gathered in it
        gathered = computed if computed.itemsize < stored.itemsize else None
        evenly_cut = cut_evenly_into_experts(moe.experts, ranks.shards)
        placement = expert_placement(ranks.shards)
        unit = self._shard(moe.experts, ranks, reshard, gathered, placement)
        if ranks.peers is None:
            return []
        return [CopiedGather(unit, evenly_cut, ranks.peers, gathered)]

    def _shard(
        self,
        module: nn.Module,
        ranks: Ranks,
        reshard: bool,
        gathered: torch.dtype | None = None,
        placement: Callable[[nn.Parameter], Shard] | None = None,
        ignored: set[nn.Parameter] | None = None,
    ) -> Any:
        """Make a module a unit of FSDP, gathered in a narrower dtype than it is stored if given."""
        stored = _trained_dtype(module)
        # The weights may become 16-bit later; replicas sum gradients in today's dtype
        summed = stored if ranks.replicated and gathered is None else gathered
        unit: Any = fully_shard(
            module,
            mesh=ranks.mesh,
            reshard_after_forward=reshard and self.reshard_after_forward,
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


def _collective_timeout(seconds: float) -> timedelta:
    if not 1 <= seconds <= _MOST_SECONDS:
        raise ConfigError(
            f"timeout is {seconds}; give seconds for a collective, from 1 to {_MOST_SECONDS:,}"
        )
    return timedelta(seconds=seconds)


def _reshard_without_backward(model: nn.Module, *_: Any) -> None:
    """Reshard after a no-grad forward pass, so that `state_dict` returns shards."""
    if not torch.is_grad_enabled():
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def keep_local_experts(moe: MoE, mesh: DeviceMesh) -> None:
    """Keep this rank's experts of a layer, and construct the exchange between them."""
    group_mesh = mesh[EXPERT_PARALLEL]
    for module in moe.experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _local_experts(parameter, group_mesh))
    moe.experts.exchange = moe.chosen["exchange"].construct(
        moe.workload, moe.experts.permutation, group_mesh.get_group()
    )


def _local_experts(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """Return this rank's experts of packed experts [E, ...], on the meta device."""
    shape = (parameter.shape[0] // mesh.size(), *parameter.shape[1:])
    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
    sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return nn.Parameter(sharded, parameter.requires_grad)
