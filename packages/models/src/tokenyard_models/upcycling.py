"""Convert the weights of a dense feed-forward layer to experts.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is a copy of the dense
layer. Granular upcycling (He et al. 2024, arXiv 2410.07524): every expert is a slice of the layer,
`granularity` slices form a group, and the router has equal rows within a group, so that a token
takes whole groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenyard import ConfigError, RoutingRule
from tokenyard.draw import draw_rows
from tokenyard_models.config import MoEConfig, check_divides, check_top_k


@dataclass(frozen=True)
class Upcycling:
    """How to convert a dense layer: to `num_experts` slices of 1/`granularity` of its width each.

    With granularity 1, every expert is a copy. With granularity `num_experts`, the layer is split.
    Raises ConfigError for numbers that contradict each other.
    """

    num_experts: int  # E
    top_k: int  # K
    granularity: int = 1  # G
    seed: int = 17  # of the router

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_top_k("top_k", self.top_k, "num_experts", self.num_experts)
        check_divides("granularity", self.granularity, "num_experts", self.num_experts)

    @property
    def keeps_function(self) -> bool:
        """Return whether a token takes whole groups, whose sum equals the dense layer's output."""
        return self.top_k % self.granularity == 0

    def experts_of(self, ffn_dim: int) -> MoEConfig:
        """Return the MoE layers that replace dense layers of width `ffn_dim`.

        The routing weights of a token sum to one. Raises ConfigError if the width cannot be split.
        """
        check_divides("granularity", self.granularity, "the width of the dense layers,", ffn_dim)
        width = ffn_dim // self.granularity
        return MoEConfig(width, self.num_experts, self.top_k, rule=RoutingRule(normalize=1))

    def up(self, dense: Tensor) -> Tensor:
        """Convert the dense layer's up [2 F, D] to the experts' [E, 2 F / G, D]."""
        slices = dense.unflatten(0, (2, self.granularity, -1)).transpose(0, 1).flatten(1, 2)
        return slices.repeat(self.num_experts // self.granularity, 1, 1)

    def down(self, dense: Tensor) -> Tensor:
        """Convert the dense layer's down [D, F] to the experts' [E, D, F / G].

        Multiplies it by G, because the routing weights sum to one.
        """
        slices = dense.unflatten(1, (self.granularity, -1)).transpose(0, 1) * self.granularity
        return slices.repeat(self.num_experts // self.granularity, 1, 1)

    def router(self, name: str, dim: int) -> Tensor:
        """Draw a router [E, D]: equal rows within a group, if tokens take whole groups."""
        same = self.granularity if self.keeps_function else 1
        rows = torch.empty(self.num_experts // same, dim)
        draw_rows(rows, self.seed, name, 1 / math.sqrt(dim))
        return rows.repeat_interleave(same, 0)
