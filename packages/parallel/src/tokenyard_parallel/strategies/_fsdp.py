"""The strategies `fsdp` and `ddp`: torch's FSDP2, with the experts of each layer as a unit of their own.

The loss that a rank brings is its part of a sum over all ranks, so gradients are summed, never averaged; then experts,
whose gradients come from other ranks' tokens by the exchange, need no rule of their own. The exchange runs inside the
experts' unit: with a collective of FSDP between the two of an exchange, ranks could wait for each other for ever.
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

from tokenyard import ConfigError, Layout, MoE, moe_layers, started_processes
from tokenyard_parallel.meshes import (
    EXPERT_PARALLEL,
    SHARD,
    Sizes,
    data_mesh,
    dense_sizes,
    expert_sizes,
    make_mesh,
    place,
)
from tokenyard_parallel.processes import connect
from tokenyard_parallel.strategies._clip import clip
from tokenyard_parallel.strategies._prefetch import gather_ahead
from tokenyard_parallel.strategies._reduce_scatter import WideSum
from tokenyard_parallel.strategies._shard_dim import cut_experts, refuse_uncut
from tokenyard_parallel.strategies._working_set import working_set


class FsdpStrategy:
    """Shards parameters, gradients and optimizer states over all processes, or over those of each of several copies.

    `replicate` is how many copies of the model there are (HSDP); `reshard_after_forward` frees the parameters of every
    block but the last between its forward and backward pass; `timeout` is how many seconds a collective may take.
    Experts are shared out as `expert_parallel` of the model says, by neighbouring processes. Constructing it joins the
    processes.
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
        self.timeout = timedelta(seconds=timeout)
        connect(self.device, self.timeout)
        self.data = place()

    def unusable(self, model: nn.Module) -> str | None:
        """Say why the model's experts cannot be shared out over the processes, and what would work."""
        try:
            sizes = self._expert_sizes(model)
            for moe in moe_layers(model):
                refuse_uncut(moe, self.dense, sizes)
        except ConfigError as error:
            return str(error)
        return None

    def layout(self, model: nn.Module) -> nn.Module:
        """Shard a model on the meta device, and install exchanges."""
        dense = data_mesh(make_mesh(self.dense, self.device, self.timeout))
        blocks = list(getattr(model, "blocks", ()))
        last = (
            set(blocks[-1].modules()) if blocks else set()
        )  # needed again at once, so it stays gathered
        if layers := moe_layers(model):
            mesh = make_mesh(self._expert_sizes(model), self.device, self.timeout)
            for moe in layers:
                self._share_out(moe, mesh, moe not in last)
        for block in blocks:
            self._shard(block, dense, block not in last)
        self._shard(model, dense, False)
        gather_ahead(model, blocks)
        model.register_forward_hook(_reshard_without_backward)
        return model

    def describe(self, model: nn.Module) -> Layout:
        """Say which ranks hold what, and how much of the model is gathered at a time."""
        meshes = {"all but experts": self.dense, "experts": self._expert_sizes(model)}
        if not moe_layers(model):
            del meshes["experts"]
        named = {which: sizes._asdict() for which, sizes in meshes.items()}
        return Layout(named, working_set(model, self.reshard_after_forward))

    def reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale all gradients to a global norm of at most max_norm; return the norm before."""
        return clip(model, max_norm)

    def _expert_sizes(self, model: nn.Module) -> Sizes:
        degrees = {moe.workload.expert_parallel for moe in moe_layers(model)} or {1}
        return expert_sizes(self.dense, max(degrees))

    def _share_out(self, moe: MoE, mesh: DeviceMesh, reshard: bool) -> None:
        """Give this rank its experts, and the exchange the ranks that hold the others; then shard them."""
        if moe.workload.expert_parallel > 1:
            among = mesh[EXPERT_PARALLEL]
            for module in moe.experts.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, _own(parameter, among))
            moe.experts.exchange = moe.chosen["exchange"].construct(
                moe.workload, moe.experts.permutation, among.get_group()
            )
        shards, stored, computed = mesh[SHARD].size(), moe.experts.up.dtype, moe.workload.dtype
        narrow = (
            computed.itemsize < stored.itemsize
        )  # Experts would round its weights to that anyway, later
        policy = (
            MixedPrecisionPolicy(computed, computed, cast_forward_inputs=False) if narrow else None
        )
        unit = self._shard(moe.experts, data_mesh(mesh), reshard, policy, cut_experts(shards))
        if narrow:
            unit.set_custom_reduce_scatter(WideSum(shards, stored))

    def _shard(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        reshard: bool,
        policy: MixedPrecisionPolicy | None = None,
        cut: Callable[[nn.Parameter], Shard] | None = None,
    ) -> Any:
        unit: Any = fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard and self.reshard_after_forward,
            shard_placement_fn=cut,
            mp_policy=policy or MixedPrecisionPolicy(cast_forward_inputs=False),
        )
        assert isinstance(unit, FSDPModule)
        if (
            mesh.size() > 1
        ):  # else there is nothing to divide, and torch would copy the gradients to divide them by 1
            unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(
            True
        )  # gloo knows no scaled sum, and two scales would be applied
        return unit


class DdpStrategy(FsdpStrategy):
    """Holds a copy of the model in every process; experts may be shared out among neighbouring ones.

    `timeout` is how many seconds a collective may take.
    """

    def __init__(self, device: torch.device | str = "cpu", timeout: float = 600.0):
        super().__init__(
            device, replicate=started_processes(), reshard_after_forward=False, timeout=timeout
        )


def _reshard_without_backward(model: nn.Module, *_: Any) -> None:
    """After a forward pass that no backward pass follows, let nothing stay gathered: states are those of shards."""
    if not torch.is_grad_enabled():
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def _own(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """Return this rank's share of experts [E, ...], on the meta device."""
    size = (parameter.shape[0] // mesh.size(), *parameter.shape[1:])
    local = torch.empty(size, dtype=parameter.dtype, device="meta")
    return nn.Parameter(
        DTensor.from_local(local, mesh, [Shard(0)], run_check=False), parameter.requires_grad
    )
