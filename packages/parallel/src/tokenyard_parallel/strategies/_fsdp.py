"""The strategy `fsdp`: torch's FSDP2, with the experts of each layer as a nested unit.

The loss of a rank is its part of a sum over all ranks. So gradients are summed and never averaged,
and experts, whose gradients include the tokens of other ranks, need no special case. The exchange
runs inside the experts' unit: an FSDP collective between its two all-to-alls could deadlock the
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tokenyard import ConfigError, MoE, ShardingReport, moe_layers, started_processes
from tokenyard_parallel.meshes import (
    EXPERT_PARALLEL,
    SHARD,
    MeshSizes,
    data_mesh,
    dense_sizes,
    expert_sizes,
    make_mesh,
    rank_and_size,
)
from tokenyard_parallel.processes import connect
from tokenyard_parallel.strategies._norm import gradient_norm
from tokenyard_parallel.strategies._prefetch import set_prefetch
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter
from tokenyard_parallel.strategies._shard_dim import check_shardable, expert_placement
from tokenyard_parallel.strategies._working_set import working_set

_MOST_SECONDS = 10_000_000


class FsdpStrategy:
    """Shards parameters, gradients and optimizer states over the ranks of each replica.

    `replicate` is the number of replicas (HSDP). `reshard_after_forward` frees the parameters of
    every block but the last between its forward and backward pass. `timeout` is how many seconds a
    collective may take. Neighbouring ranks hold different experts, as `expert_parallel` of the
    model says. The constructor initializes the default process group.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        replicate: int = 1,
        reshard_after_forward: bool = True,
        timeout: float = 600.0,
    ):
        self.device = torch.device(device)
        self.dense = dense_sizes(started_processes(), replicate)
        self.reshard_after_forward = reshard_after_forward
        self.timeout = _collective_timeout(timeout)
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
        dense = data_mesh(make_mesh(self.dense, self.device, self.timeout))
        blocks = list(getattr(model, "blocks", ()))
        # the backward pass starts with the last block, so it stays gathered
        last = set(blocks[-1].modules()) if blocks else set()
        unsharded: set[nn.Parameter] = set()
        if layers := moe_layers(model):
            mesh = make_mesh(self._expert_sizes(model), self.device, self.timeout)
            for moe in layers:
                if moe.workload.expert_parallel > 1:
                    keep_local_experts(moe, mesh)
                if 1 < moe.workload.expert_parallel == mesh.size():
                    # no other rank has these experts, so a unit would only copy them
                    unsharded.update(moe.experts.parameters())
                else:
                    self._shard_experts(moe, mesh, moe not in last)
        for block in blocks:
            self._shard(block, dense, block not in last, ignored=unsharded)
        self._shard(model, dense, False, ignored=unsharded)
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

    def _shard_experts(self, moe: MoE, mesh: DeviceMesh, reshard: bool) -> None:
        """Shard this rank's experts over the ranks that hold the same ones."""
        shards = mesh[SHARD].size()
        stored = _trained_dtype(moe.experts)
        computed = moe.workload.dtype
        # Experts cast their weights to the compute dtype anyway, so they are gathered in it
        narrow = computed.itemsize < stored.itemsize
        policy = None
        if narrow:
            policy = MixedPrecisionPolicy(computed, computed, cast_forward_inputs=False)
        unit = self._shard(moe.experts, data_mesh(mesh), reshard, policy, expert_placement(shards))
        if narrow:
            unit.set_custom_reduce_scatter(WideReduceScatter(shards, stored))

    def _shard(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        reshard: bool,
        policy: MixedPrecisionPolicy | None = None,
        placement: Callable[[nn.Parameter], Shard] | None = None,
        ignored: set[nn.Parameter] | None = None,
    ) -> Any:
        if policy is None:
            # The weights may become 16-bit later; gradients are summed in today's dtype.
            dtype = _trained_dtype(module)
            policy = MixedPrecisionPolicy(reduce_dtype=dtype, cast_forward_inputs=False)
        unit: Any = fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard and self.reshard_after_forward,
            shard_placement_fn=placement,
            mp_policy=policy,
            ignored_params=ignored,
        )
        assert isinstance(unit, FSDPModule)
        # on one rank torch would copy the gradients to divide them by 1
        if mesh.size() > 1:
            unit.set_gradient_divide_factor(1.0)
        # gloo has no scaled sum; without this, two factors would apply
        unit.set_force_sum_reduction_for_comms(True)
        return unit


def _trained_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the parameters that are trained; without any, of the frozen ones."""
    parameters = sorted(module.parameters(), key=lambda p: not p.requires_grad)
    return parameters[0].dtype


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
