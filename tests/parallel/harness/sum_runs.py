"""Backward passes of small models whose gradients `ddp` sums over ranks."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenyard_parallel.strategies import _gradient_sum
from tokenyard_parallel.strategies._gradient_sum import GradientSum


class Positions(nn.Module):
    """Adds positions as a view, so that their gradient is also that of the embedding's output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.positions = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(self.embed(ids) + self.positions.unsqueeze(0))
        return output


class Recomputed(Positions):
    """Recomputes the head, whose graph is built within the backward pass."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions
        output: Tensor = checkpoint(self.head, x, use_reentrant=True)
        return output


class Shared(Recomputed):
    """Uses the recomputed weight once more."""

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = super().forward(ids) @ self.head.weight
        return output


def output_loss(model: Positions) -> None:
    """Run a backward pass from the output."""
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()


def weight_loss(model: Positions) -> None:
    """Run a backward pass from a weight, while the graph of a forward pass exists."""
    output = model(torch.tensor([[1, 2, 3]]))
    model.head.weight.square().sum().backward()
    del output


def shared_recompute(numbers: int) -> str:
    """Run a backward pass with a shared weight; return the error, or which sums are right."""
    model = Shared()
    output_loss(model)
    plain = _gradients(model)
    model = Shared()
    GradientSum(model, lambda parameter: dist.group.WORLD, early=True)
    try:
        with patch.object(_gradient_sum, "EARLY", numbers):
            output_loss(model)
    except RuntimeError as error:
        return str(error)
    right = [torch.allclose(g, 2 * plain[name]) for name, g in _gradients(model).items()]
    return f"{sum(right)} of {len(plain)}"


def gradients(
    model: type[Positions], backward: Callable[[Positions], None], early: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of a backward pass without and with sums over ranks.

    Ranks have equal inputs. With `early`, each gradient is summed as soon as it is complete.
    """
    plain = model()
    backward(plain)
    summed = model()
    GradientSum(summed, lambda parameter: dist.group.WORLD, early)
    with patch.object(_gradient_sum, "EARLY", 1):
        backward(summed)
    return _gradients(plain), _gradients(summed)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
