"""The experts of a rank with expert parallelism, and the exchange between ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tokenyard import MoE
from tokenyard_parallel.meshes import EXPERT_PARALLEL


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
