"""Standard tests of strategies, in one process and over two."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tokenyard.backend import Kind
from tokenyard.numerics import relative_error
from tokenyard.testing._base import Conformance
from tokenyard.testing._over_ranks import Net, strategy_on_rank
from tokenyard.testing._ranks import ranks
from tokenyard.workload import Workload


class StrategyConformance(Conformance):
    """What every strategy must do on one process, and one that is for several on two."""

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
            before = (
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                .double()
                .norm()
            )
            norm = strategy.clip(model, max_norm)
            after = (
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                .double()
                .norm()
            )
            assert relative_error(norm, before) < 1e-5
            assert relative_error(after, before if share is None else torch.tensor(share)) < 1e-4

    @pytest.mark.parametrize("case", ["even", "idle", "frozen"])
    @pytest.mark.parametrize("expert_parallel", [1, 2])
    def test_equals_one_process_over_two(self, expert_parallel: int, case: str) -> None:
        """Gradients, their norm and its clipping, in float64, by gloo; each rank reads other data, or none."""
        seed = int(torch.randint(1 << 30, ()).item())
        path, options = self.offered().path, dict(self.options)
        found = ranks(2).run(strategy_on_rank, path, options, expert_parallel, case, seed)
        if isinstance(found[0], str):
            pytest.skip(f"{self.backend}: {found[0]}")
        if found[0].data == (0, 1):
            pytest.skip(f"{self.backend}: is for one process")
        assert [laid.data for laid in found] == [(0, 2), (1, 2)]
        for laid in found:
            assert max(laid.gradients, laid.norm, laid.reduced) < 1e-12, laid
            assert laid.clipped < 1e-5, laid  # torch adds 1e-6 to the norm that it divides by

    def _strategy(self) -> Any:
        return self.construct(device=self.run_device())

    def _laid_out(self, strategy: Any) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = Net(Workload(8, 12, 4, 2, device=self.run_device()))
        assert strategy.unusable(model) is None
        model = strategy.layout(model)
        assert all(p.is_meta for p in model.parameters()), (
            "layout allocated what only to_empty should"
        )
        model = model.to_empty(device=self.run_device())
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return model
