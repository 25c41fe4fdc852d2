"""What becomes of a dense layer's weights when it is made experts.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is a copy of the dense layer. Granular
upcycling (He et al. 2024, arXiv 2410.07524): every expert is a slice of it, `granularity` slices make a group, and the
rows of the router are the same within a group, so that tokens take whole groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenyard import ConfigError, RoutingRule
from tokenyard_models.config import MoEConfig, check_divides, check_top_k
from tokenyard_models.init_weights import draw_rows


@dataclass(frozen=True)
class Upcycling:
    """What becomes of a dense feed-forward layer: `num_experts` slices of it, each one `granularity`-th of its width.

    With granularity 1 an expert is a copy; with as many as there are experts, they are the layer, split.
    Raises ConfigError for numbers that do not go together.
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
        """Say whether a token takes whole groups, whose sum is what the dense layer computes."""
        return self.top_k % self.granularity == 0

    def experts_of(self, ffn_dim: int) -> MoEConfig:
        """Return the MoE layers in place of dense ones [D, ffn_dim]; the chosen weights sum to one."""
        check_divides("granularity", self.granularity, "the width of the dense layers,", ffn_dim)
        width = ffn_dim // self.granularity
        return MoEConfig(width, self.num_experts, self.top_k, rule=RoutingRule(normalize=1))

    def up(self, dense: Tensor) -> Tensor:
        """Return the experts' up [E, 2 F / G, D] from the dense layer's [2 F, D]."""
        slices = dense.unflatten(0, (2, self.granularity, -1)).transpose(0, 1).flatten(1, 2)
        return slices.repeat(self.num_experts // self.granularity, 1, 1)

    def down(self, dense: Tensor) -> Tensor:
        """Return the experts' down [E, D, F / G] from the dense layer's [D, F]: G times, since weights sum to one."""
        slices = dense.unflatten(1, (self.granularity, -1)).transpose(0, 1) * self.granularity
        return slices.repeat(self.num_experts // self.granularity, 1, 1)

    def router(self, name: str, dim: int) -> Tensor:
        """Return a router [E, D]: a row for each group, or for each expert if tokens do not take whole groups."""
        same = self.granularity if self.keeps_function else 1
        rows = torch.empty(self.num_experts // same, dim)
        draw_rows(rows, self.seed, name, 1 / math.sqrt(dim))
        return rows.repeat_interleave(same, 0)
