"""One norm of gradients on different meshes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenyard.norm import total_norm
from tokenyard.sharded import group_by_mesh, is_sharded, local_part


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients over all ranks; each shard counts once.

    It takes one collective over all ranks, whatever the meshes, so a non-finite gradient on one
    rank makes it non-finite on all of them.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    device = parameters[0].device if parameters else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    dtype = torch.float32
    for group in group_by_mesh(parameters):
        gradients = [p.grad for p in group if p.grad is not None]
        # DTensor would plan the sharding of each operator, which is slow in the first step
        norm = total_norm([local_part(gradient) for gradient in gradients])
        total += norm.double().square() * _shards(gradients[0]) / dist.get_world_size()
        dtype = norm.dtype
    dist.all_reduce(total)
    return total.sqrt().to(dtype)


def _shards(gradient: Tensor) -> int:
    """Return the number of different shards of a gradient."""
    if not is_sharded(gradient):
        return 1
    mesh = gradient.device_mesh
    return math.prod(
        mesh.size(dim)
        for dim, placement in enumerate(gradient.placements)
        if not placement.is_replicate()
    )
