"""The `single` strategy: the whole model on one device of one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenyard.interfaces import M, ShardingReport, Strategy
from tokenyard.moe import allow_weight_copies, moe_layers
from tokenyard.norm import total_norm


class SingleStrategy(Strategy):
    """Keeps everything on one device."""

    data = (0, 1)

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def unusable(self, model: nn.Module) -> str | None:
        """Return a reason if the model wants expert parallelism, else None."""
        degree = max((moe.workload.expert_parallel for moe in moe_layers(model)), default=1)
        if degree == 1:
            return None
        return (
            f"'single' keeps all experts in one process, and expert_parallel is {degree}; "
            "give fsdp or ddp, or 1"
        )

    def layout(self, model: M) -> M:
        """Return the model: one process holds all of it, and weights change in place only."""
        allow_weight_copies(model)
        return model

    def describe(self, model: nn.Module) -> ShardingReport:
        """Return an empty report: one rank, which gathers nothing."""
        return ShardingReport({}, 0)

    def reduce(self, x: Tensor) -> Tensor:
        """Return x: there is one data rank."""
        return x

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """Return the global norm of all gradients."""
        return total_norm([p.grad for p in model.parameters() if p.grad is not None])
