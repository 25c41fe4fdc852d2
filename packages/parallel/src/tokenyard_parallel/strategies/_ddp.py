"""The strategy `ddp`: a replica of the model on every rank.

Parameters are never gathered, so a step does little on the host. Small models gain from that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenyard import ShardingReport, moe_layers, started_processes
from tokenyard.moe import allow_weight_copies
from tokenyard.norm import total_norm
from tokenyard.sharded import has_shards, is_sharded, local_part
from tokenyard_parallel.meshes import REPLICATE, make_mesh
from tokenyard_parallel.strategies._fsdp import FsdpStrategy
from tokenyard_parallel.strategies._gradient_sum import EARLY, GradientSum
from tokenyard_parallel.strategies._local_experts import keep_local_experts
from tokenyard_parallel.strategies._packed_gradients import BUCKET

_SUMMED = 4  # bytes of a number in float32


class DdpStrategy(FsdpStrategy):
    """Keeps a replica of the model on every rank; neighbouring ranks may hold different experts.

    Each backward pass sums its gradients over the replicas. `timeout` is how many seconds a
    collective may take.
    """

    def __init__(self, device: torch.device | str = "cpu", timeout: float = 600.0):
        super().__init__(device, replicate=started_processes(), timeout=timeout)

    def layout(self, model: nn.Module) -> nn.Module:
        """Keep this rank's experts, install exchanges, and sum gradients after each backward."""
        layers = moe_layers(model)
        sizes = self._expert_sizes(model)
        expert_replicas: Any = dist.group.WORLD
        if sizes.expert_parallel > 1:
            mesh = make_mesh(sizes, self.device, self.timeout)
            expert_replicas = mesh[REPLICATE].get_group()
            for moe in layers:
                keep_local_experts(moe, mesh)
        else:
            allow_weight_copies(model)

        def replicas(parameter: Tensor) -> Any:
            return expert_replicas if is_sharded(parameter) else dist.group.WORLD

        # A sum between the trips of an exchange could deadlock the ranks
        GradientSum(model, replicas, early=sizes.expert_parallel == 1)
        return model

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """Return the norm of all gradients. Without shards, every rank has all of them."""
        if has_shards(model):
            return super().gradient_norm(model)
        return total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def describe(self, model: nn.Module) -> ShardingReport:
        """Report the mesh sizes, and the bytes of the largest sum of gradients."""
        meshes, _ = super().describe(model)
        numbers = [local_part(p).numel() for p in model.parameters() if p.requires_grad]
        largest = max(numbers, default=0)
        most = BUCKET if has_shards(model) else min(BUCKET, EARLY + largest)
        return ShardingReport(meshes, max(largest, min(sum(numbers), most)) * _SUMMED)
