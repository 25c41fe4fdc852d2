"""Low-rank adapters (LoRA) of packed expert weights: W + alpha / rank * B A.

Source: Hu et al. 2021, arXiv 2106.09685. Each expert has its own A and B. Every forward pass adds
B A to W before it calls the expert kernel, so adapters work with every kernel.
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
"""The expert weight that an adapter changes."""


class LoraAdapter(nn.Module):
    """Adds low-rank matrices to the `up` and `down` weights of an `Experts`, or to one of them.

    Parameters: `up_a` [E, rank, D], `up_b` [E, 2F or F, rank], `down_a` [E, rank, F] and `down_b`
    [E, D, rank]. B is initially zero, so a new adapter does not change the output.
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
        """Return the weights plus their low-rank deltas, in the dtype of the weights."""
        adapted = {
            name: weight + self.delta(name, weight.dtype)
            for name, weight in weights._asdict().items()
            if self.has(name)
        }
        return weights._replace(**adapted)

    def has(self, target: str) -> bool:
        """Return True if this adapter changes the weight `target`."""
        return f"{target}_a" in self._parameters

    def delta(self, target: str, dtype: torch.dtype) -> Tensor:
        """Return alpha / rank * B A [E, rows, columns] for the experts of this rank."""
        a, b = (local_weight(getattr(self, f"{target}_{name}"), dtype) for name in "ab")
        return self.scale * torch.bmm(b.to(dtype), a.to(dtype))


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[LoraTarget] = get_args(LoraTarget)
) -> None:
    """Add an adapter to the experts of every MoE layer, and freeze all other parameters.

    Raises ConfigError if the model has no experts or already has adapters.
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
    """Add each adapter's delta to its weights, and remove the adapters.

    Raises ConfigError if the model is sharded.
    """
    for moe in moe_layers(model):
        experts = moe.experts
        adapter = experts.adapter
        if not isinstance(adapter, LoraAdapter):
            continue
        if is_sharded(experts.up):
            raise ConfigError(
                "a sharded model's adapters cannot be merged; load it in one process first"
            )
        for target in filter(adapter.has, get_args(LoraTarget)):
            weight: Tensor = getattr(experts, target)
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wide) + adapter.delta(target, wide))
        experts.adapter = None
