"""Low-rank adapters of packed expert weights: W + alpha / rank * B A (Hu et al. 2021, arXiv 2106.09685).

Of the experts of a layer each has its own A and B. The sum is formed in every forward pass, so that every expert kernel
computes it as it is; a kernel that keeps the two apart can come later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tokenyard.errors import ConfigError
from tokenyard.experts import Experts
from tokenyard.experts._weights import local_weight
from tokenyard.interfaces import ExpertWeights
from tokenyard.moe import moe_layers
from tokenyard.sharded import is_sharded

LoraTarget = Literal["up", "down"]
"""Which of an expert's matrices."""


class LoraAdapter(nn.Module):
    """Adds to an Experts' `up` and `down`, or to one of them, what its own parameters make.

    For `up` these are `up_a` [E, rank, D] and `up_b` [E, 2F or F, rank], for `down` `down_a` [E, rank, F] and `down_b`
    [E, D, rank]. B begins as zero, so that an adapter changes nothing at first.
    """

    def __init__(self, experts: Experts, rank: int, alpha: float, targets: Sequence[LoraTarget]):
        super().__init__()
        self.scale = alpha / rank
        for target in targets:
            weight: Tensor = getattr(experts, target)
            count, rows, columns = weight.shape
            self.register_parameter(
                f"{target}_a", nn.Parameter(weight.new_empty(count, rank, columns))
            )
            self.register_parameter(
                f"{target}_b", nn.Parameter(weight.new_zeros(count, rows, rank))
            )
            nn.init.uniform_(getattr(self, f"{target}_a"), -(columns**-0.5), columns**-0.5)

    def forward(self, weights: ExpertWeights) -> ExpertWeights:
        """Return weights with this adapter's part added, in their dtype."""
        added = {
            name: w + self.part(name, w.dtype)
            for name, w in weights._asdict().items()
            if self.has(name)
        }
        return weights._replace(**added)

    def has(self, target: str) -> bool:
        """Say whether a weight has a part here."""
        return f"{target}_a" in self._parameters

    def part(self, target: str, dtype: torch.dtype) -> Tensor:
        """Return alpha / rank * B A, of the experts of this rank."""
        a, b = (local_weight(getattr(self, f"{target}_{name}"), dtype) for name in "ab")
        return self.scale * torch.bmm(b.to(dtype), a.to(dtype))


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[LoraTarget] = get_args(LoraTarget)
) -> None:
    """Give the experts of every MoE layer an adapter, and let nothing else of the model be trained.

    Raises ConfigError if there are no experts, or they have adapters already.
    """
    layers = moe_layers(model)
    if not layers:
        raise ConfigError("lora is for experts, and the model has none")
    if any(moe.experts.adapter is not None for moe in layers):
        raise ConfigError(
            "the model's experts have adapters already; merge_lora makes them part of the weights"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for moe in layers:
        moe.experts.adapter = LoraAdapter(moe.experts, rank, alpha, targets)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Make adapters part of the weights that they add to, and drop them. Raises ConfigError for a sharded model."""
    for moe in moe_layers(model):
        experts, adapter = moe.experts, moe.experts.adapter
        if not isinstance(adapter, LoraAdapter):
            continue
        if is_sharded(experts.up):
            raise ConfigError(
                "a sharded model's adapters cannot be merged; load it in one process first"
            )
        for target in filter(adapter.has, get_args(LoraTarget)):
            weight: Tensor = getattr(experts, target)
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wide) + adapter.part(target, wide))
        experts.adapter = None
