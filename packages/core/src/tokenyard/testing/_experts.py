"""Standard tests of expert kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenyard.activations import ACTIVATIONS
from tokenyard.backend import Kind
from tokenyard.interfaces import ExpertWeights
from tokenyard.numerics import relative_error
from tokenyard.permutations import TorchPermutation
from tokenyard.testing import _oracle
from tokenyard.testing._cases import ROUTINGS, Call, Case, make_case, random_ids, routings
from tokenyard.testing._compare import CustomOps, assert_close, fresh, poisoned_memory
from tokenyard.testing._in_layer import LayerPartConformance
from tokenyard.workload import Workload

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ExpertsConformance(LayerPartConformance):
    """What every expert kernel must do. `tile` is the kernel's row tile: token counts around it are tried.

    A quantised kernel sets `quantised`: its errors are then recorded as test properties instead of judged.
    """

    kind: ClassVar[Kind] = "experts"
    tile: ClassVar[int] = 64
    quantised: ClassVar[bool] = False
    dim: ClassVar[int] = 32
    ffn_dim: ClassVar[int] = 48

    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_oracle(
        self, dtype: torch.dtype, activation: str, bias: bool, record_property: Any
    ) -> None:
        """Output and every gradient, in every dtype, for every activation, with and without biases."""
        self._check(
            self._case(random_ids(37, 4, 2), 4, dtype=dtype, activation=activation, bias=bias),
            record_property,
        )

    @pytest.mark.parametrize("count", ["0", "1", "7", "tile-1", "tile", "tile+1"])
    def test_token_counts(self, count: str, record_property: Any) -> None:
        """No token, one, few, and a tile's worth less and more, all to few experts."""
        tokens = {
            "0": 0,
            "1": 1,
            "7": 7,
            "tile-1": self.tile - 1,
            "tile": self.tile,
            "tile+1": self.tile + 1,
        }[count]
        case = self._case(random_ids(tokens, 4, 1), 4)
        with (
            torch.no_grad()
        ):  # a lone token's weight gradient is <dy, y>: random dy could make it vanish
            case = replace(case, dy=self._oracle(case))
        self._check(case, record_property)

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("top_k", [1, 3, 5], ids="top{}".format)
    def test_routings(self, routing: str, top_k: int, record_property: Any) -> None:
        """Skew, empty experts (their gradients exactly zero), repeated ids, dropped slots, and K = E."""
        ids = routings(41, 5, top_k)[routing]
        case = self._case(ids, 5, bias=True)
        got = self._check(case, record_property)
        for e in set(range(5)) - set(ids.flatten().tolist()):
            for name in got.keys() & {f"d {field}" for field in ExpertWeights._fields}:
                assert not got[name][e].any(), (
                    f"{name} of expert {e}, which got no token, is not exactly zero"
                )

    @pytest.mark.parametrize("wanted", ["x", "topk_weights", "up", "down", "up_bias", "down_bias"])
    def test_one_gradient_alone(self, wanted: str, record_property: Any) -> None:
        """With one input requiring grad, its gradient is right and no other is made."""
        case = self._case(random_ids(23, 4, 2), 4, bias=True)
        if wanted not in case.tensors:
            pytest.skip(
                f"{self.backend}: {self.offered().unusable(replace(case.workload, bias=True))}"
            )
        for name, tensor in case.tensors.items():
            tensor.requires_grad_(name == wanted)
        got = self._check(case, record_property)
        assert set(got) == {"y", f"d {wanted}"}

    def test_without_weights(self, record_property: Any) -> None:
        """K = 1 with topk_weights None: rows that an exchange sent are summed as they are."""
        case = self._case(random_ids(29, 4, 1), 4)
        del case.tensors["topk_weights"]
        self._check(case, record_property)

    def test_static_rows_bound(self, record_property: Any) -> None:
        """A bound above the real row count changes nothing; tokens and weights that were dropped are not read."""
        ids = torch.where(torch.rand(40, 2) < 0.5, 4, random_ids(40, 4, 2)).int()
        ids[10:20] = 4
        case = self._case(ids, 4)
        expected = self._expected(case)
        with torch.no_grad():
            case.tensors["x"][10:20] = float("nan")
            case.dy[10:20] = float("nan")
            case.tensors["topk_weights"][ids.to(case.ids.device) >= 4] = float("nan")
        kernel = self._kernel(case)
        got = self._results(case, lambda c: kernel(c, rows=int((ids < 4).sum()) + 5))
        for name, result in got.items():
            assert result.isfinite().all(), (
                f"{name} read a token, weight or gradient that was dropped"
            )
        self._judge(got, expected, record_property)

    def test_strided_inputs(self, record_property: Any) -> None:
        """x that is not contiguous, and an incoming gradient that is expanded."""
        case = self._case(random_ids(31, 4, 2), 4)
        wide = torch.randn(31, 2 * self.dim, dtype=case.dy.dtype, device=case.dy.device)
        case.tensors["x"] = wide[:, ::2].detach().requires_grad_()
        row = torch.randn(self.dim, dtype=case.dy.dtype, device=case.dy.device)
        case = replace(case, dy=row.expand(case.dy.shape))
        self._check(case, record_property)

    def test_inputs_are_not_mutated(self) -> None:
        """Neither inputs nor the incoming gradient change, in forward or backward."""
        case = self._case(random_ids(33, 4, 2), 4, bias=True)
        before = {name: t.detach().clone() for name, t in case.tensors.items()} | {
            "dy": case.dy.clone()
        }
        self._results(case, self._kernel(case))
        after = {name: t.detach() for name, t in case.tensors.items()} | {"dy": case.dy}
        for name in before:
            assert torch.equal(before[name], after[name]), f"the kernel changed {name} in place"

    def test_same_result_twice(self) -> None:
        """Bit by bit, forward and backward."""
        case = self._case(random_ids(97, 4, 3), 4, bias=True)
        first, second = (self._results(case, self._kernel(case)) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), f"{name} differs from run to run"

    def test_compiles_whole(self, record_property: Any) -> None:
        """``torch.compile(fullgraph=True)`` gives the same, also when the token count changes."""
        torch.compiler.reset()
        case = self._case(random_ids(26, 4, 2), 4, bias=True)
        kernel = self._kernel(case)
        compiled = torch.compile(kernel.call, fullgraph=True, backend="aot_eager")
        for ids in (case.ids, random_ids(19, 4, 2)):
            again = make_case(case.workload, ids)
            got = self._results(again, lambda c: compiled(c.tensors, c.ids))
            self._judge(got, self._expected(again), record_property)

    def test_custom_ops_pass_opcheck(self) -> None:
        """Every custom op that the kernel runs has a right schema, fake kernel and autograd registration."""
        case = self._case(random_ids(18, 4, 2), 4, bias=True)
        with CustomOps() as ops:
            self._results(case, self._kernel(case))
        for op, args, kwargs, differentiable in ops.calls:
            torch.library.opcheck(op, tuple(fresh(a, differentiable) for a in args), kwargs)

    def _case(
        self, ids: Tensor, num_experts: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Case:
        workload = Workload(
            self.dim,
            self.ffn_dim,
            num_experts,
            ids.shape[1],
            device=self.run_device(),
            dtype=dtype or torch.float32,
            **kwargs,
        )
        if dtype is None:
            workload = self._narrowed(workload)
        return make_case(workload, ids)

    def _narrowed(self, workload: Workload) -> Workload:
        """Return the workload as the backend can do it, where the test is about neither dtype nor biases."""
        for bias, dtype in product(dict.fromkeys((workload.bias, False)), DTYPES[1:]):
            candidate = replace(workload, bias=bias, dtype=dtype)
            if self.offered().unusable(candidate) is None:
                return candidate
        return workload

    def _kernel(self, case: Case) -> Call:
        permutation = TorchPermutation(case.workload)
        return Call(
            self.construct(case.workload, permutation, workload=case.workload),
            permutation,
            case.workload,
        )

    def _oracle(self, case: Case) -> Tensor:
        return _oracle.experts(
            case.tensors["x"],
            case.ids,
            case.tensors.get("topk_weights"),
            case.weights(),
            case.workload.activation,
        )

    def _results(self, case: Case, run: Any) -> dict[str, Tensor]:
        leaves = {name: t for name, t in case.tensors.items() if t.requires_grad}
        with poisoned_memory():
            y = run(case)
            assert y.requires_grad, "y is cut off from everything that requires a gradient"
            grads = torch.autograd.grad(y, list(leaves.values()), case.dy, allow_unused=True)
        lost = [name for name, grad in zip(leaves, grads) if grad is None]
        assert not lost, f"no gradient reaches {', '.join(lost)}; is it used, and not detached?"
        return {"y": y.detach()} | {f"d {name}": grad for name, grad in zip(leaves, grads)}

    def _expected(self, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the results of plain torch code in the case's dtype, and those of the float64 oracle."""
        return self._results(case, self._oracle), self._results(
            case.to(torch.float64), self._oracle
        )

    def _check(self, case: Case, record_property: Any) -> dict[str, Tensor]:
        got = self._results(case, self._kernel(case))
        self._judge(got, self._expected(case), record_property)
        return got

    def _judge(self, got: dict[str, Tensor], expected: Any, record_property: Any) -> None:
        plain, oracle = expected
        for name, want in oracle.items():
            record_property(f"error of {name}", relative_error(got[name], want))
        if not self.quantised:
            assert_close(got, plain, oracle, got["y"].dtype)
