"""The strategy `fsdp`: torch's FSDP2, with the experts of each layer as a nested unit.

The loss of a rank is its part of a sum over all ranks. So gradients are summed and never averaged,
and experts, whose gradients include the tokens of other ranks, need no special case. The exchange
runs inside the experts' unit: an FSDP collective between its two all-to-alls could deadlock the
ranks.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from tokenyard import ConfigError, ShardingReport, moe_layers, started_processes
from tokenyard.errors import one_of
from tokenyard_parallel.meshes import (
    SHARD,
    MeshSizes,
    data_mesh,
    dense_sizes,
    expert_sizes,
    make_mesh,
    rank_and_size,
)
from tokenyard_parallel.processes import connect
from tokenyard_parallel.strategies._gather import CopiedGather, attach_before_forward
from tokenyard_parallel.strategies._local_experts import keep_local_experts
from tokenyard_parallel.strategies._norm import gradient_norm
from tokenyard_parallel.strategies._peers import TRANSFERS, peers_of
from tokenyard_parallel.strategies._prefetch import set_prefetch
from tokenyard_parallel.strategies._shard_dim import check_shardable
from tokenyard_parallel.strategies._units import Ranks, shard_experts, shard_module
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
                    reshard = self.reshard_after_forward and moe not in last
                    gathers += shard_experts(moe, ranks, reshard)
        for block in blocks:
            reshard = self.reshard_after_forward and block not in last
            shard_module(block, dense, reshard, ignored=unsharded)
        shard_module(model, dense, False, ignored=unsharded)
        attach_before_forward(model, gathers)
        set_prefetch(model, blocks)
        model.register_forward_hook(_reshard_without_backward)
        return model

    def describe(self, model: nn.Module) -> ShardingReport:
        """Report the mesh sizes, and the peak bytes of gathered parameters."""
        meshes = {"all but experts": self.dense._asdict()}
        if moe_layers(model):
            meshes["experts"] = self._expert_sizes(model)._asdict()
        copies = self.transfers == "copies" or (
            self.transfers == "auto" and self.device.type == "cuda"
        )
        return ShardingReport(meshes, working_set(model, self.reshard_after_forward, copies))

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
