"""Gradient clipping by one norm over parameters on different meshes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenyard.sharded import group_by_mesh, is_sharded, local_part
from tokenyard_parallel._torch_private import scale_all


@torch.no_grad()
def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients to a global norm of at most max_norm; return the norm before scaling.

    The norm is the same on every rank. It takes one collective over all ranks, whatever the meshes,
    so a non-finite gradient on one rank makes it non-finite on all of them.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = _global_norm(group_by_mesh(parameters))
    if parameters and math.isfinite(max_norm):
        # as torch clips: 1e-6 keeps a norm of zero from dividing by zero
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # DTensor would plan the sharding of each operator, which is slow in the first step
        scale_all([local_part(p.grad) for p in parameters if p.grad is not None], scale)
    return norm


def _global_norm(groups: list[list[nn.Parameter]]) -> Tensor:
    """Return the norm over all ranks; each shard counts once, however many ranks hold it."""
    total = torch.zeros((), dtype=torch.float64, device=groups[0][0].device if groups else None)
    for group in groups:
        gradients = [p.grad for p in group if p.grad is not None]
        norm = nn.utils.get_total_norm([local_part(gradient) for gradient in gradients])
        total += norm.double().square() * _shards(gradients[0]) / dist.get_world_size()
    dist.all_reduce(total)
    return total.sqrt().to(groups[0][0].dtype if groups else torch.float32)


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
