"""Standard tests of strategies, in one process."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tokenyard.backend import Kind
from tokenyard.moe import MoE
from tokenyard.numerics import relative_error
from tokenyard.testing._base import Conformance
from tokenyard.workload import Workload


class _Net(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.moe = MoE(Workload(8, 12, 4, 2, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(self.first(x))[0]


class StrategyConformance(Conformance):
    """What every strategy must do on one process."""

    kind: ClassVar[Kind] = "strategy"

    def test_lays_out_a_meta_model(self) -> None:
        """A model on the meta device becomes an allocated one that trains."""
        strategy = self._strategy()
        model = self._laid_out(strategy)
        assert all(not p.is_meta for p in model.parameters())
        y = model(torch.randn(5, 8, device=self.run_device()))
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_data_rank(self) -> None:
        """One process reads all the data, and sums over itself."""
        strategy = self._strategy()
        rank, size = strategy.data
        assert (rank, size) == (0, 1)
        x = torch.randn(3, device=self.run_device())
        assert torch.equal(strategy.reduce(x.clone()), x)

    def test_clips_by_the_global_norm(self) -> None:
        """The norm returned is that of all gradients before; afterwards they have the one asked for, or their own."""
        strategy = self._strategy()
        for max_norm, share in ((0.5, 0.5), (math.inf, None)):
            model = self._laid_out(strategy)
            model(torch.randn(64, 8, device=self.run_device())).square().sum().backward()
            before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().norm()
            norm = strategy.clip(model, max_norm)
            after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().norm()
            assert relative_error(norm, before) < 1e-5
            assert relative_error(after, before if share is None else torch.tensor(share)) < 1e-4

    def _strategy(self) -> Any:
        return self.construct(device=self.run_device())

    def _laid_out(self, strategy: Any) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = _Net(self.run_device())
        assert strategy.unusable(model) is None
        model = strategy.layout(model)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return model
