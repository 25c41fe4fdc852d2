"""Standard tests of permutations."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenyard.backend import Kind
from tokenyard.interfaces import Plan, logits_dtype
from tokenyard.testing._cases import ROUTINGS, random_ids, routings
from tokenyard.testing._compare import CustomOps, assert_close, fresh, poisoned_memory
from tokenyard.testing._in_layer import LayerPartConformance
from tokenyard.tolerance import relative_error
from tokenyard.workload import Workload

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
E = 5


class PermutationConformance(LayerPartConformance):
    """Standard tests of every permutation: exact plans, and correct moves and gradients."""

    kind: ClassVar[Kind] = "permutation"
    dim: ClassVar[int] = 16

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("top_k", [1, 3, 5], ids="top{}".format)
    @pytest.mark.parametrize("tokens", [1, 7, 64, 65])
    def test_plan_is_a_stable_sort(self, tokens: int, top_k: int, routing: str) -> None:
        """`plan` sorts slots by expert, stably; `inverse` is the inverse of `order`.

        If only "some dropped" or "all dropped" fails, ids >= E are counted as an expert.
        """
        ids = routings(tokens, E, top_k)[routing]
        plan = self._permutation(top_k).plan(ids.to(self.run_device()), E)
        slots = ids.flatten().tolist()
        kept = [[slot for slot, e in enumerate(slots) if e == expert] for expert in range(E)]
        counts = [len(expert_slots) for expert_slots in kept]
        assert {t.dtype for t in plan[:3]} == {torch.int32}
        assert plan.top_k == top_k
        assert plan.offsets.tolist() == [0, *accumulate(counts)]
        rows = [slot for expert_slots in kept for slot in expert_slots]
        assert plan.order.tolist()[: len(rows)] == rows
        assert len(plan.order) == len(slots)
        in_range = all(0 <= slot < len(slots) for slot in plan.order.tolist())
        assert in_range, "the tail must hold slots that exist"
        row_of = dict(zip(rows, range(len(rows))))
        for slot, row in enumerate(plan.inverse.tolist()):
            assert row == row_of.get(slot, row)
            assert (row >= len(rows)) == (slot not in row_of)

    def test_plan_of_no_tokens(self) -> None:
        """T = 0 gives an empty order and inverse, and zero offsets."""
        ids = torch.empty(0, 2, dtype=torch.int32, device=self.run_device())
        plan = self._permutation(2).plan(ids, E)
        assert [t.tolist() for t in plan[:3]] == [[], [], [0] * (E + 1)]

    @pytest.mark.parametrize("slack", [0, 1, 9])
    def test_static_rows_bound(self, slack: int) -> None:
        """The argument `rows` shortens the tail of the plan, and changes nothing else."""
        permutation = self._permutation(3)
        ids = routings(33, E, 3)["some dropped"].to(self.run_device())
        kept = int((ids < E).sum())
        full = permutation.plan(ids, E)
        bounded = permutation.plan(ids, E, rows=kept + slack)
        assert len(bounded.order) == min(kept + slack, ids.numel())
        assert torch.equal(bounded.order[:kept], full.order[:kept])
        assert torch.equal(bounded.offsets, full.offsets)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_permute(self, dtype: torch.dtype) -> None:
        """`permute` gathers tokens to rows with a zero tail; its gradient sums a token's rows."""
        permutation, plan, ids = self._planned(dtype)
        x = self._randn(ids.shape[0], dtype=dtype).requires_grad_()
        gradient = self._randn(len(plan.order), dtype=dtype)
        with poisoned_memory():
            rows = permutation.permute(x, plan)
            (dx,) = torch.autograd.grad(rows, x, gradient)
        assert torch.equal(rows, _rows(x.detach(), plan))
        plain = _tokens(gradient, plan, None, ids.shape[0]).to(dtype)
        oracle = _tokens(gradient.to(torch.float64), plan, None, ids.shape[0])
        assert_close({"d x": dx}, {"d x": plain}, {"d x": oracle})

    @pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_unpermute(self, dtype: torch.dtype, weighted: bool) -> None:
        """`unpermute` returns the weighted sum of a token's rows, with the right gradients.

        If only low precision fails, accumulate in float32.
        """
        permutation, plan, ids = self._planned(dtype)
        inputs = {"rows": self._randn(len(plan.order), dtype=dtype).requires_grad_()}
        if weighted:
            weights = torch.rand(ids.shape, dtype=logits_dtype(dtype), device=self.run_device())
            inputs["weights"] = weights.requires_grad_()
        gradient = self._randn(ids.shape[0], dtype=dtype)
        with poisoned_memory():
            y = permutation.unpermute(inputs["rows"], plan, inputs.get("weights"))
            got = _with_gradients(y, inputs, gradient)
        plain = _plain_unpermute(inputs, plan, gradient, dtype)
        oracle = _plain_unpermute(inputs, plan, gradient, torch.float64)
        assert_close(got, plain, oracle)

    def test_tail_is_never_read(self) -> None:
        """NaN in the tail, or in the gradient of a dropped token, reaches no result.

        If this fails, the permutation multiplies by zero; mask with a select (``torch.where``).
        """
        permutation, plan, ids = self._planned(torch.float32)
        live = int(plan.offsets[-1])
        rows = self._randn(len(plan.order), dtype=torch.float32)
        rows[live:] = float("nan")
        weights = torch.rand(ids.shape, device=rows.device).requires_grad_()
        y = permutation.unpermute(rows.requires_grad_(), plan, weights)
        dy = torch.ones_like(y)
        dy[0] = float("nan")  # all slots of this token are dropped
        drows, dweights = torch.autograd.grad(y, [rows, weights], dy)
        assert live < len(rows)
        assert y.isfinite().all()
        assert drows.isfinite().all()
        assert dweights.isfinite().all()
        assert not drows[live:].any()
        assert not dweights[ids.to(rows.device) >= E].any()

    def test_same_result_twice(self) -> None:
        """Two runs give bitwise equal results and gradients.

        If this fails, the permutation adds with atomics.
        """
        permutation, plan, ids = self._planned(torch.float32)
        x = self._randn(ids.shape[0], dtype=torch.float32).requires_grad_()
        weights = torch.rand(ids.shape, device=x.device).requires_grad_()

        def run() -> tuple[Tensor, ...]:
            y = permutation.unpermute(permutation.permute(x, plan), plan, weights)
            return (y, *torch.autograd.grad(y, [x, weights], torch.ones_like(y)))

        assert all(torch.equal(a, b) for a, b in zip(run(), run()))

    def test_custom_ops_pass_opcheck(self) -> None:
        """All custom ops of both moves pass ``torch.library.opcheck``.

        It checks the schema, the fake kernel and the autograd registration.
        """
        permutation, plan, ids = self._planned(torch.float32)
        x = self._randn(ids.shape[0], dtype=torch.float32).requires_grad_()
        weights = torch.rand(ids.shape, device=x.device).requires_grad_()
        with CustomOps() as ops:
            y = permutation.unpermute(permutation.permute(x, plan), plan, weights)
            torch.autograd.grad(y, [x, weights], torch.ones_like(y))
        for op, args, kwargs, differentiable in ops.calls:
            torch.library.opcheck(op, tuple(fresh(a, differentiable) for a in args), kwargs)

    def test_compiles_whole(self) -> None:
        """``torch.compile(fullgraph=True)`` of plan and both moves gives the same results.

        If this fails with a graph break, register the functions as operators
        (``tokenyard.operators``).
        """
        torch.compiler.reset()
        permutation = self._permutation(3)

        def plan_and_move(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            plan = permutation.plan(ids, E)
            return permutation.unpermute(permutation.permute(x, plan), plan, weights)

        ids = routings(33, E, 3)["some dropped"].to(self.run_device())
        x = self._randn(33, dtype=torch.float32).requires_grad_()
        weights = torch.rand(ids.shape, device=x.device)
        want = plan_and_move(x, ids, weights)
        got = torch.compile(plan_and_move, fullgraph=True, backend="aot_eager")(x, ids, weights)
        assert relative_error(got, want) < 1e-6
        (want_dx,) = torch.autograd.grad(want.sum(), x)
        (got_dx,) = torch.autograd.grad(got.sum(), x)
        assert relative_error(got_dx, want_dx) < 1e-6

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


def _with_gradients(y: Tensor, inputs: Mapping[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
    """Return y and the gradients of the inputs by name, for the gradient of y."""
    grads = torch.autograd.grad(y, list(inputs.values()), gradient)
    return {"y": y.detach()} | {f"d {name}": grad for name, grad in zip(inputs, grads)}


def _plain_unpermute(
    inputs: Mapping[str, Tensor], plan: Plan, gradient: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return y and gradients of `unpermute` by plain torch code in `dtype`."""
    dtypes = {"rows": dtype, "weights": logits_dtype(dtype)}
    leaves = {name: t.detach().to(dtypes[name]).requires_grad_() for name, t in inputs.items()}
    y = _tokens(leaves["rows"], plan, leaves.get("weights"), gradient.shape[0]).to(dtype)
    return _with_gradients(y, leaves, gradient.to(dtype))


def _rows(x: Tensor, plan: Plan) -> Tensor:
    """Gather tokens x [T, D] to rows [R, D] in a Python loop."""
    rows = torch.zeros(len(plan.order), x.shape[1], dtype=x.dtype, device=x.device)
    for row in range(int(plan.offsets[-1])):
        rows[row] = x[int(plan.order[row]) // plan.top_k]
    return rows


def _tokens(rows: Tensor, plan: Plan, weights: Tensor | None, tokens: int) -> Tensor:
    """Return [T, D]: the weighted sum of each token's rows, by a matmul with a [T, R] matrix."""
    live = int(plan.offsets[-1])
    wide = logits_dtype(rows.dtype)
    slot = plan.order[:live].long()
    if weights is None:
        value = torch.ones(live, dtype=wide, device=rows.device)
    else:
        value = weights.flatten()[slot]
    matrix = torch.zeros(tokens, live, dtype=wide, device=rows.device)
    matrix = matrix.index_put((slot // plan.top_k, torch.arange(live, device=rows.device)), value)
    return matrix @ rows[:live].to(wide)
