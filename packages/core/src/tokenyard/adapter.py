"""Low-rank matrices beside the frozen weights of one module (LoRA): y = x W^T + s (x A^T) B^T.

Source: Hu et al. 2021, arXiv 2106.09685. W + s B A is never formed in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tokenyard.errors import ConfigError


@dataclass(frozen=True)
class LoraSettings:
    """The options of all adapters of a model. Raises ConfigError for impossible ones."""

    rank: int
    alpha: float
    dropout: float = 0.0  # of the input of A, while training
    rank_stabilized: bool = False  # s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def scale(self) -> float:
        """Return s, the factor of an adapter's output."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class LoraAdapter(nn.Module):
    """The low-rank matrices of some weights of one module.

    A weight `w` [..., rows, columns] has the parameters `w_a` [..., P * rank, columns] and `w_b`
    [..., rows, rank]. B is initially zero, so a new adapter does not change the output. P is 1,
    except for a fused weight: each of its P parts has an A of its own, as separate layers would.
    `parts` maps such a weight to the rows of each part.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        parts: Mapping[str, Sequence[int]],
        settings: LoraSettings,
    ):
        super().__init__()
        self.hook: RemovableHandle | None = (
            None  # adds this adapter to the output of a linear layer
        )
        self.settings = settings
        self.parts = {name: tuple(rows) for name, rows in parts.items() if name in weights}
        rank = settings.rank
        for name, weight in weights.items():
            *experts, rows, columns = weight.shape
            height = rank * len(self.parts.get(name, (rows,)))
            a = nn.Parameter(weight.new_empty(*experts, height, columns))
            nn.init.uniform_(a, -(columns**-0.5), columns**-0.5)
            self.register_parameter(f"{name}_a", a)
            self.register_parameter(
                f"{name}_b", nn.Parameter(weight.new_zeros(*experts, rows, rank))
            )

    @property
    def scale(self) -> float:
        """Return s, the factor of the output."""
        return self.settings.scale

    @property
    def targets(self) -> list[str]:
        """Return the names of the weights that have matrices here."""
        return [name.removesuffix("_a") for name in self._parameters if name.endswith("_a")]

    def matrices(self, target: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight."""
        return getattr(self, f"{target}_a"), getattr(self, f"{target}_b")

    def forward(self, y: Tensor, x: Tensor, target: str) -> Tensor:
        """Return y [..., rows] plus what the adapter of a dense weight makes of x [..., columns].

        Without matrices for that weight, return y.
        """
        if f"{target}_a" not in self._parameters:
            return y
        a, b = self.matrices(target)
        low = self.scale * F.linear(self.dropped(x), a)  # [..., P * rank]
        if target not in self.parts:
            return y + F.linear(low, b)
        pieces = zip(low.split(self.settings.rank, -1), b.split(self.parts[target]))
        return y + torch.cat([F.linear(piece, rows) for piece, rows in pieces], -1)

    def widened(self, x: Tensor, weight: Tensor, target: str) -> tuple[Tensor, Tensor]:
        """Return x [..., columns + rank] and a weight [rows, columns + rank] with B beside it.

        Their matmul has the adapter in it. This is for a weight without parts whose matmul is not
        computed by its module, such as a head's in the loss. It copies the weight.
        """
        a, b = self.matrices(target)
        low = self.scale * F.linear(self.dropped(x), a)
        return torch.cat((x, low.to(x.dtype)), -1), torch.cat((weight, b), -1)

    def dropped(self, x: Tensor) -> Tensor:
        """Return x after dropout."""
        if not self.training or self.settings.dropout == 0:
            return x
        return F.dropout(x, self.settings.dropout)

    def delta(self, target: str, dtype: torch.dtype) -> Tensor:
        """Return s B A [..., rows, columns], the change of a weight, computed in `dtype`."""
        a, b = (matrix.to(dtype) for matrix in self.matrices(target))
        sizes = self.parts.get(target, (b.shape[-2],))
        pieces = zip(b.split(sizes, -2), a.split(self.settings.rank, -2))
        return self.scale * torch.cat([rows @ piece for rows, piece in pieces], -2)
