"""Standard tests of strategies, in one process and over two ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tokenyard.backend import Kind
from tokenyard.testing._base import Conformance
from tokenyard.testing._over_ranks import Net, strategy_on_rank
from tokenyard.testing._ranks import ranks
from tokenyard.tolerance import relative_error
from tokenyard.workload import Workload


class StrategyConformance(Conformance):
    """Standard tests of every strategy; one for several processes is also tested on two ranks."""

    kind: ClassVar[Kind] = "strategy"

    def test_lays_out_a_meta_model(self) -> None:
        """A model of the meta device stays there in `layout`, and trains after `to_empty`.

        If this fails, `layout` allocates parameters, or detaches them from the model.
        """
        strategy = self._strategy()
        model = self._laid_out(strategy)
        assert all(not p.is_meta for p in model.parameters())
        y = model(torch.randn(5, 8, device=self.run_device()))
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_describes_the_layout(self) -> None:
        """The report is the same before and after allocation, with mesh sizes of at least 1."""
        strategy = self._strategy()
        with torch.device("meta"):
            model = strategy.layout(Net(Workload(8, 12, 4, 2, device=self.run_device())))
        report = strategy.describe(model)
        sizes = [size for mesh in report.meshes.values() for size in mesh.values()]
        assert all(size >= 1 for size in sizes)
        assert report.working_set >= 0
        assert strategy.describe(model.to_empty(device=self.run_device())) == report

    def test_data_rank(self) -> None:
        """In one process, `data` is (0, 1) and `reduce` returns its input."""
        strategy = self._strategy()
        rank, size = strategy.data
        assert (rank, size) == (0, 1)
        x = torch.randn(3, device=self.run_device())
        assert torch.equal(strategy.reduce(x.clone()), x)

    def test_gradient_norm(self) -> None:
        """`gradient_norm` returns the norm of all gradients, and changes none.

        If this fails, it misses parameters.
        """
        strategy = self._strategy()
        model = self._laid_out(strategy)
        model(torch.randn(64, 8, device=self.run_device())).square().sum().backward()
        before = _gradient_norm(model)
        assert relative_error(strategy.gradient_norm(model), before) < 1e-5
        assert torch.equal(_gradient_norm(model), before)

    @pytest.mark.parametrize("case", ["even", "idle", "frozen"])
    @pytest.mark.parametrize("expert_parallel", [1, 2])
    def test_equals_one_process_over_two(self, expert_parallel: int, case: str) -> None:
        """Over two ranks (gloo, float64), gradients and norm equal those of one process.

        Each rank has other tokens, or none ("idle"). If only "idle" fails, a rank without tokens
        skips a collective. If only "frozen" fails, the strategy expects a gradient for every
        parameter.
        """
        seed = int(torch.randint(1 << 30, ()).item())
        options = dict(self.options)
        arguments = (self.offered().path, options, expert_parallel, case, seed)
        results = ranks(2).run(strategy_on_rank, *arguments)
        if isinstance(results[0], str):
            pytest.skip(f"{self.backend}: {results[0]}")
        if results[0].data == (0, 1):
            pytest.skip(f"{self.backend}: is for one process")
        assert [result.data for result in results] == [(0, 2), (1, 2)]
        for result in results:
            assert max(result.gradients, result.norm, result.reduced) < 1e-12, result

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


def _gradient_norm(model: nn.Module) -> Tensor:
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients).double().norm()
