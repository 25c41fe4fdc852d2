"""One gradient norm over parameters that lie on different meshes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients to a global norm of at most max_norm; return the norm before, the same on every rank.

    One collective over all ranks, whatever the meshes; what is not finite on one rank so reaches all of them.
    """
    groups = _by_mesh([p for p in model.parameters() if p.grad is not None])
    norm = _global_norm(groups)
    if math.isfinite(max_norm):
        for group in groups:  # torch scales no list of tensors that lie on different meshes
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _global_norm(groups: list[list[nn.Parameter]]) -> Tensor:
    """Add up the squares of all ranks' shards, each rank's by the share of them that are no other rank's copies."""
    total = torch.zeros((), dtype=torch.float64, device=groups[0][0].device if groups else None)
    for group in groups:
        gradients = [p.grad for p in group if p.grad is not None]
        local = nn.utils.get_total_norm(
            [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        )
        total += local.double().square() * _shards(gradients[0]) / dist.get_world_size()
    dist.all_reduce(total)
    return total.sqrt().to(groups[0][0].dtype if groups else torch.float32)


def _shards(gradient: Tensor) -> int:
    """Return how many different shards there are of a gradient."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(
        mesh.size(i)
        for i, placement in enumerate(gradient.placements)
        if not placement.is_replicate()
    )


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(
            parameter.device_mesh if isinstance(parameter, DTensor) else None, []
        ).append(parameter)
    return list(groups.values())
