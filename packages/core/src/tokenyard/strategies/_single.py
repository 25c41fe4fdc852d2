"""The `single` strategy: the whole model on one device of one process."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokenyard.interfaces import M, ShardingReport, Strategy
from tokenyard.moe import moe_layers


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
        """Return the model unchanged: one process holds all of it."""
        return model

    def describe(self, model: nn.Module) -> ShardingReport:
        """Return an empty report: one rank, which gathers nothing."""
        return ShardingReport({}, 0)

    def reduce(self, x: Tensor) -> Tensor:
        """Return x: there is one data rank."""
        return x

    def clip(self, model: nn.Module, max_norm: float = math.inf) -> Tensor:
        """Scale all gradients to a global norm of at most max_norm; return the original norm."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if math.isfinite(max_norm):
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm
