"""Standard tests of exchanges, in one process and over two ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenyard.backend import Kind
from tokenyard.interfaces import Compute, ExpertWeights, Routing
from tokenyard.permutations import TorchPermutation
from tokenyard.testing import _oracle
from tokenyard.testing._base import Conformance
from tokenyard.testing._cases import ROUTINGS, make_case, routings
from tokenyard.testing._over_ranks import exchange_on_rank
from tokenyard.testing._ranks import ranks
from tokenyard.tolerance import relative_error
from tokenyard.workload import Workload


class ExchangeConformance(Conformance):
    """Standard tests of every exchange, with and without a process group."""

    kind: ClassVar[Kind] = "exchange"

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_equals_computing_in_place(self, routing: str) -> None:
        """In one process, y and the gradients of x and topk_weights equal those of `compute`.

        If this fails, the exchange loses, repeats or reorders slots. Run in float64.
        """
        exchange = self._exchange()
        case = make_case(self._workload(), routings(21, 4, 2)[routing])
        inputs = [case.tensors["x"], case.tensors["topk_weights"]]
        logits = torch.zeros(21, 4, dtype=torch.float64, device=self.run_device())

        def in_place(x: Tensor, routing: Routing, compute: Compute) -> Tensor:
            return compute(x, routing.topk_ids, routing.topk_weights)

        results = []
        for run in (exchange, in_place):
            y = run(
                inputs[0],
                Routing(case.ids, inputs[1], logits),
                lambda *args: self._compute(case.weights(), *args),
            )
            results.append([y, *torch.autograd.grad(y, inputs, case.dy)])
        for got, want in zip(*results):
            assert relative_error(got, want) < 1e-13

    def test_no_tokens(self) -> None:
        """T = 0 gives an empty y with an empty gradient.

        If this fails, the exchange needs at least one token, or detaches an empty result.
        """
        exchange = self._exchange()
        case = make_case(self._workload(), torch.empty(0, 2, dtype=torch.int32))
        x = case.tensors["x"]
        routing = Routing(case.ids, case.tensors["topk_weights"], x.new_zeros(0, 4))
        y = exchange(x, routing, lambda *args: self._compute(case.weights(), *args))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.shape == dx.shape == (0, 8)
        assert exchange.rows_per_token == 0, "nothing travels in one process"

    @pytest.mark.parametrize("shares", [[11, 10], [21, 0]], ids=["uneven", "a rank without tokens"])
    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_equals_computing_in_place_over_two_ranks(
        self, routing: str, shares: list[int]
    ) -> None:
        """Over two ranks (gloo, float64), y and all gradients equal those of one process.

        The gradients are those of x, topk_weights and the local expert weights. If this fails only
        for a rank without tokens, that rank skips a collective.
        """
        offer = self.offered()
        workload = Workload(8, 12, 4, 2, dtype=torch.float64, expert_parallel=2)
        reason = offer.unusable(workload)
        if reason is not None:
            pytest.skip(f"{self.backend}: {reason}")
        seed = int(torch.randint(1 << 30, ()).item())
        for errors in ranks(2).run(
            exchange_on_rank, offer.path, dict(self.options), routing, shares, seed
        ):
            assert max(errors) < 1e-13, dict(zip(("y", "dx", "dweights", "dup", "ddown"), errors))

    def _workload(self) -> Workload:
        return Workload(8, 12, 4, 2, dtype=torch.float64, device=self.run_device())

    def _exchange(self) -> Any:
        workload = self._workload()
        return self.construct(workload, TorchPermutation(workload), None, workload=workload)

    @staticmethod
    def _compute(
        weights: ExpertWeights, x: Any, ids: Any, topk_weights: Any, rows: int | None = None
    ) -> Any:
        return _oracle.experts(x, ids, topk_weights, weights, "swiglu")
