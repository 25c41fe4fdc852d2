"""The inputs of experts with low-rank adapters, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tokenyard.experts._grouped_matmuls import rows_times
from tokenyard.interfaces import ExpertWeights, Plan


class LoraPair(NamedTuple):
    """A and B of one weight, for rows sorted by expert."""

    a: Tensor  # [E, rank, columns]
    b: Tensor  # [E, rows, rank]
    scale: float
    offsets: Tensor

    def low(self, rows: Tensor) -> Tensor:
        """Return s x A^T [R, rank] for x [R, columns]."""
        return rows_times(rows, self.a.mT, self.offsets) * self.scale

    def add(self, y: Tensor, rows: Tensor) -> None:
        """Add s (x A^T) B^T to y [R, rows] for x [R, columns]."""
        y += rows_times(self.low(rows), self.b.mT, self.offsets)

    def low_gradient(self, dy: Tensor) -> Tensor:
        """Return s dy B [R, rank] for dy [R, rows]."""
        return rows_times(dy, self.b, self.offsets) * self.scale


class LoraCall(NamedTuple):
    """The inputs of a forward pass, by name."""

    x: Tensor  # [T, D]
    plan: Plan
    topk_weights: Tensor | None  # [T, K]
    weights: ExpertWeights
    up: LoraPair | None
    down: LoraPair | None
    dropped: Tensor | None  # [T, D] x after dropout, the input of A of up; None: x
    mask: Tensor | None  # [R, F] bool: the activations that A of down sees; None: all
    activation: str

    def masked(self, rows: Tensor) -> Tensor:
        """Return the input of A of down, after dropout, for activations [R, F]."""
        return rows if self.mask is None else rows * self.mask


def lora_call(arguments: tuple[Any, ...]) -> LoraCall:
    """Return the inputs of the operator by name."""
    x, order, inverse, offsets, topk_weights = arguments[:5]
    *pairs, dropped, mask, top_k, up_scale, down_scale, activation = arguments[9:]
    up_a, up_b, down_a, down_b = pairs
    return LoraCall(
        x,
        Plan(order, inverse, offsets, top_k),
        topk_weights,
        ExpertWeights(*arguments[5:9]),
        None if up_a is None else LoraPair(up_a, up_b, up_scale, offsets),
        None if down_a is None else LoraPair(down_a, down_b, down_scale, offsets),
        dropped,
        mask,
        activation,
    )
