"""Standard tests of permutations."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenyard.backend import Kind
from tokenyard.interfaces import Plan, logits_dtype
from tokenyard.numerics import relative_error
from tokenyard.testing._cases import ROUTINGS, random_ids, routings
from tokenyard.testing._compare import CustomOps, assert_close, fresh, poisoned_memory
from tokenyard.testing._in_layer import LayerPartConformance
from tokenyard.workload import Workload

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
E = 5


class PermutationConformance(LayerPartConformance):
    """What every permutation must do: exact plans, and moves whose gradients are each other."""

    kind: ClassVar[Kind] = "permutation"
    dim: ClassVar[int] = 16

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("top_k", [1, 3, 5], ids="top{}".format)
    @pytest.mark.parametrize("tokens", [1, 7, 64, 65])
    def test_plan_is_a_stable_sort(self, tokens: int, top_k: int, routing: str) -> None:
        """Offsets count each expert's slots, rows of an expert ascend by slot, and inverse inverts order."""
        ids = routings(tokens, E, top_k)[routing]
        plan = self._permutation(top_k).plan(ids.to(self.run_device()), E)
        slots = ids.flatten().tolist()
        kept = [[slot for slot, e in enumerate(slots) if e == expert] for expert in range(E)]
        assert {t.dtype for t in plan[:3]} == {torch.int32}
        assert plan.top_k == top_k
        assert plan.offsets.tolist() == [
            0,
            *torch.tensor([len(k) for k in kept]).cumsum(0).tolist(),
        ]
        rows = [slot for expert in kept for slot in expert]
        assert plan.order.tolist()[: len(rows)] == rows
        assert len(plan.order) == len(slots)
        assert all(0 <= slot < len(slots) for slot in plan.order.tolist()), (
            "the tail must hold slots that exist"
        )
        row_of = dict(zip(rows, range(len(rows))))
        for slot, row in enumerate(plan.inverse.tolist()):
            assert row == row_of.get(slot, row)
            assert (row >= len(rows)) == (slot not in row_of)

    def test_plan_of_no_tokens(self) -> None:
        """T = 0 gives empty order and inverse, and zero offsets."""
        plan = self._permutation(2).plan(
            torch.empty(0, 2, dtype=torch.int32, device=self.run_device()), E
        )
        assert [t.tolist() for t in plan[:3]] == [[], [], [0] * (E + 1)]

    @pytest.mark.parametrize("slack", [0, 1, 9])
    def test_static_rows_bound(self, slack: int) -> None:
        """A bound on the rows cuts the plan's tail and nothing else."""
        permutation, ids = (
            self._permutation(3),
            routings(33, E, 3)["some dropped"].to(self.run_device()),
        )
        kept = int((ids < E).sum())
        whole, bound = permutation.plan(ids, E), permutation.plan(ids, E, rows=kept + slack)
        assert len(bound.order) == min(kept + slack, ids.numel())
        assert torch.equal(bound.order[:kept], whole.order[:kept])
        assert torch.equal(bound.offsets, whole.offsets)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_permute(self, dtype: torch.dtype) -> None:
        """Each row is its token, the tail is zero, and the gradient sums a token's rows."""
        permutation, plan, ids = self._planned(dtype)
        x = self._randn(ids.shape[0], dtype=dtype).requires_grad_()
        gradient = self._randn(len(plan.order), dtype=dtype)
        with poisoned_memory():
            rows = permutation.permute(x, plan)
            (dx,) = torch.autograd.grad(rows, x, gradient)
        assert torch.equal(rows, _rows(x.detach(), plan))
        got, want = (
            {"d x": dx},
            [_tokens(gradient.to(d), plan, None, ids.shape[0]) for d in (dtype, torch.float64)],
        )
        assert_close(got, {"d x": want[0].to(dtype)}, {"d x": want[1]})

    @pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_unpermute(self, dtype: torch.dtype, weighted: bool) -> None:
        """The weighted sum of a token's rows, and the gradients of rows and weights."""
        permutation, plan, ids = self._planned(dtype)
        rows = self._randn(len(plan.order), dtype=dtype)
        weights = (
            torch.rand(ids.shape, dtype=logits_dtype(dtype), device=rows.device)
            if weighted
            else None
        )
        gradient = self._randn(ids.shape[0], dtype=dtype)
        inputs = [t.requires_grad_() for t in (rows, weights) if t is not None]
        names = ["d rows", "d weights"][: len(inputs)]
        with poisoned_memory():
            y = permutation.unpermute(rows, plan, weights)
            got = {"y": y.detach()} | dict(zip(names, torch.autograd.grad(y, inputs, gradient)))
        plain, oracle = (
            self._plain(rows, weights, plan, gradient, names, d) for d in (dtype, torch.float64)
        )
        assert_close(got, plain, oracle)

    def test_tail_is_never_read(self) -> None:
        """NaN in the tail of rows, or coming back for a dropped token, reaches neither tokens nor gradients."""
        permutation, plan, ids = self._planned(torch.float32)
        live = int(plan.offsets[-1])
        rows = self._randn(len(plan.order), dtype=torch.float32)
        rows[live:] = float("nan")
        weights = torch.rand(ids.shape, device=rows.device).requires_grad_()
        y = permutation.unpermute(rows.requires_grad_(), plan, weights)
        dy = torch.ones_like(y)
        dy[0] = float("nan")  # this token's slots were all dropped
        drows, dweights = torch.autograd.grad(y, [rows, weights], dy)
        assert live < len(rows)
        assert y.isfinite().all()
        assert drows.isfinite().all()
        assert dweights.isfinite().all()
        assert not drows[live:].any()
        assert not dweights[ids.to(rows.device) >= E].any()

    def test_same_result_twice(self) -> None:
        """Bit by bit, with gradients."""
        permutation, plan, ids = self._planned(torch.float32)
        x = self._randn(ids.shape[0], dtype=torch.float32).requires_grad_()
        weights = torch.rand(ids.shape, device=x.device).requires_grad_()

        def run() -> tuple[Tensor, ...]:
            y = permutation.unpermute(permutation.permute(x, plan), plan, weights)
            return (y, *torch.autograd.grad(y, [x, weights], torch.ones_like(y)))

        assert all(torch.equal(a, b) for a, b in zip(run(), run()))

    def test_custom_ops_pass_opcheck(self) -> None:
        """Every custom op that moves rows has a right schema, fake kernel and autograd registration."""
        permutation, plan, ids = self._planned(torch.float32)
        x = self._randn(ids.shape[0], dtype=torch.float32).requires_grad_()
        weights = torch.rand(ids.shape, device=x.device).requires_grad_()
        with CustomOps() as ops:
            y = permutation.unpermute(permutation.permute(x, plan), plan, weights)
            torch.autograd.grad(y, [x, weights], torch.ones_like(y))
        for op, args, kwargs, differentiable in ops.calls:
            torch.library.opcheck(op, tuple(fresh(a, differentiable) for a in args), kwargs)

    def test_compiles_whole(self) -> None:
        """Planning and both moves in one graph, forward and backward."""
        torch.compiler.reset()
        permutation = self._permutation(3)

        def there_and_back(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            plan = permutation.plan(ids, E)
            return permutation.unpermute(permutation.permute(x, plan), plan, weights)

        ids = routings(33, E, 3)["some dropped"].to(self.run_device())
        x = self._randn(33, dtype=torch.float32).requires_grad_()
        weights = torch.rand(ids.shape, device=x.device)
        want = there_and_back(x, ids, weights)
        got = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x, ids, weights)
        assert relative_error(got, want) < 1e-6
        assert relative_error(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want))) < 1e-6

    def _permutation(self, top_k: int, dtype: torch.dtype = torch.float32) -> Any:
        workload = Workload(self.dim, self.dim, E, top_k, dtype=dtype, device=self.run_device())
        return self.construct(workload, workload=workload)

    def _planned(self, dtype: torch.dtype) -> tuple[Any, Plan, Tensor]:
        permutation = self._permutation(3, dtype)
        ids = torch.where(torch.rand(33, 3) < 0.3, E, random_ids(33, E, 3)).int()
        ids[0] = E
        return permutation, permutation.plan(ids.to(self.run_device()), E), ids

    def _randn(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, self.dim, dtype=dtype, device=self.run_device())

    def _plain(
        self,
        rows: Tensor,
        weights: Tensor | None,
        plan: Plan,
        gradient: Tensor,
        names: list[str],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        wide = logits_dtype(dtype)
        inputs = [
            rows.detach().to(dtype),
            *([] if weights is None else [weights.detach().to(wide)]),
        ]
        inputs = [t.requires_grad_() for t in inputs]
        y = _tokens(inputs[0], plan, inputs[1] if len(inputs) > 1 else None, gradient.shape[0]).to(
            dtype
        )
        return {"y": y.detach()} | dict(
            zip(names, torch.autograd.grad(y, inputs, gradient.to(dtype)))
        )


def _rows(x: Tensor, plan: Plan) -> Tensor:
    rows = torch.zeros(len(plan.order), x.shape[1], dtype=x.dtype, device=x.device)
    for row in range(int(plan.offsets[-1])):
        rows[row] = x[int(plan.order[row]) // plan.top_k]
    return rows


def _tokens(rows: Tensor, plan: Plan, weights: Tensor | None, tokens: int) -> Tensor:
    """Sum rows into tokens by an explicit [T, R] matrix."""
    live = int(plan.offsets[-1])
    wide = logits_dtype(rows.dtype)
    slot = plan.order[:live].long()
    value = (
        torch.ones(live, dtype=wide, device=rows.device)
        if weights is None
        else weights.flatten()[slot]
    )
    matrix = torch.zeros(tokens, live, dtype=wide, device=rows.device)
    matrix = matrix.index_put((slot // plan.top_k, torch.arange(live, device=rows.device)), value)
    return matrix @ rows[:live].to(wide)
