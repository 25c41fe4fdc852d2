"""Standard tests of expert kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenyard.activations import ACTIVATIONS, swiglu
from tokenyard.backend import Kind
from tokenyard.interfaces import ExpertWeights, GradientSums, logits_dtype
from tokenyard.permutations import TorchPermutation
from tokenyard.testing import _oracle
from tokenyard.testing._cases import (
    ROUTINGS,
    Call,
    Case,
    keep_off_limit,
    make_case,
    random_ids,
    routings,
)
from tokenyard.testing._compare import CustomOps, assert_close, fresh, poisoned_memory
from tokenyard.testing._in_layer import LayerPartConformance
from tokenyard.tolerance import relative_error
from tokenyard.workload import Workload

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

WITH_OPTIONS = (swiglu(limit=2.5), swiglu(alpha=1.702, limit=2.5, offset=1.0))
"""Activations with options. The limit is so low that the tests' values meet it."""


def _pairs() -> Iterator[Any]:
    """Yield every dtype with every activation; biases alternate, so each pair of values is met."""
    for i, dtype in enumerate(DTYPES):
        for j, activation in enumerate((*ACTIVATIONS, *WITH_OPTIONS)):
            bias = (i + j) % 2 == 1
            name = f"{dtype}-{activation}-{'bias' if bias else 'plain'}"
            yield pytest.param(dtype, activation, bias, id=name)


class ExpertsConformance(LayerPartConformance):
    """Standard tests of every expert kernel.

    `tile` is the number of rows of the kernel's tiles; the tests use token counts around it. Set
    `quantised` for a quantised kernel: the tests then record its errors as test properties, and do
    not compare them with a tolerance.
    """

    kind: ClassVar[Kind] = "experts"
    tile: ClassVar[int] = 64
    quantised: ClassVar[bool] = False

    @pytest.mark.parametrize(("dtype", "activation", "bias"), list(_pairs()))
    def test_matches_oracle(
        self, dtype: torch.dtype, activation: str, bias: bool, record_property: Any
    ) -> None:
        """y and all gradients match the oracle, for every pair of dtype, activation and bias.

        If only one gradient fails, check its equation. If only low precision fails, accumulate in
        float32.
        """
        ids = random_ids(19, 4, 2)
        case = self._case(ids, 4, dtype=dtype, activation=activation, bias=bias)
        keep_off_limit(case)
        self._check(case, record_property)

    @pytest.mark.parametrize("count", ["0", "1", "7", "tile-1", "tile", "tile+1"])
    def test_token_counts(self, count: str, record_property: Any) -> None:
        """Results match the oracle for 0, 1 and 7 tokens, and for counts around a tile.

        If this fails, check the masks of the last tile and the launch with an empty grid.
        """
        tile = self.tile
        tile_counts = {"tile-1": tile - 1, "tile": tile, "tile+1": tile + 1}
        tokens = tile_counts[count] if count in tile_counts else int(count)
        case = self._case(random_ids(tokens, 4, 1), 4)
        # the weight gradient of a single token is <dy, y>, which could be near 0 for a random dy
        with torch.no_grad():
            case = replace(case, dy=self._oracle(case))
        self._check(case, record_property)

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("top_k", [1, 3, 5], ids="top{}".format)
    def test_routings(self, routing: str, top_k: int, record_property: Any) -> None:
        """Results match for skew, empty experts, repeated ids, dropped slots, and K = E.

        The weight gradients of an empty expert are exactly zero. If this fails for them, the
        kernel skips empty experts and leaves their gradients uninitialised.
        """
        tokens = self.tile + 9 if routing == "all to one expert" else 23
        ids = routings(tokens, 5, top_k)[routing]
        case = self._case(ids, 5, bias=True)
        got = self._check(case, record_property)
        for e in set(range(5)) - set(ids.flatten().tolist()):
            for name in got.keys() & {f"d {field}" for field in ExpertWeights._fields}:
                assert not got[name][e].any(), (
                    f"{name} of expert {e}, which got no token, is not exactly zero"
                )

    @pytest.mark.parametrize("wanted", ["x", "topk_weights", "up", "down", "up_bias", "down_bias"])
    def test_one_gradient_alone(self, wanted: str, record_property: Any) -> None:
        """If one input requires grad, its gradient is right and no other is returned.

        If this fails, the backward pass computes a gradient only together with another one.
        """
        case = self._case(random_ids(11, 4, 2), 4, bias=True)
        if wanted not in case.tensors:
            reason = self.offered().unusable(replace(case.workload, bias=True))
            pytest.skip(f"{self.backend}: {reason}")
        for name, tensor in case.tensors.items():
            tensor.requires_grad_(name == wanted)
        got = self._check(case, record_property)
        assert set(got) == {"y", f"d {wanted}"}

    def test_without_weights(self, record_property: Any) -> None:
        """With K = 1 and topk_weights None, rows are not weighted.

        An exchange calls the kernel like this for rows that it weights itself.
        """
        case = self._case(random_ids(17, 4, 1), 4)
        del case.tensors["topk_weights"]
        self._check(case, record_property)

    def test_static_rows_bound(self, record_property: Any) -> None:
        """A bound above the real row count changes nothing, and dropped slots are not read.

        Dropped tokens, weights and gradients are NaN. If this fails, the kernel multiplies them by
        zero; mask them with a select (``torch.where``).
        """
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
        """x may be strided, and the gradient of y may be expanded.

        If this fails, the kernel assumes contiguous inputs: use their strides or ``contiguous()``.
        """
        case = self._case(random_ids(31, 4, 2), 4)
        wide = torch.randn(31, 2 * self.dim, dtype=case.dy.dtype, device=case.dy.device)
        case.tensors["x"] = wide[:, ::2].detach().requires_grad_()
        row = torch.randn(self.dim, dtype=case.dy.dtype, device=case.dy.device)
        case = replace(case, dy=row.expand(case.dy.shape))
        self._check(case, record_property)

    def test_inputs_are_not_mutated(self) -> None:
        """Forward and backward change neither the inputs nor the gradient of y."""
        case = self._case(random_ids(17, 4, 2), 4, bias=True)
        tensors = {**case.tensors, "dy": case.dy}
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._results(case, self._kernel(case))
        for name, copy in copies.items():
            unchanged = torch.equal(tensors[name].detach(), copy)
            assert unchanged, f"the kernel changed {name} in place"

    def test_same_result_twice(self) -> None:
        """Two runs give bitwise equal results, forward and backward.

        If this fails, the kernel adds with atomics, or reads uninitialised memory.
        """
        # more rows of an expert than a tile has
        case = self._case(random_ids(self.tile + 1, 2, 2), 2, bias=True)
        first = self._results(case, self._kernel(case))
        second = self._results(case, self._kernel(case))
        for name in first:
            assert torch.equal(first[name], second[name]), f"{name} differs from run to run"

    def test_passes_over_one_graph(self) -> None:
        """Backward passes over a retained graph, and the last one, give bitwise equal gradients.

        If this fails, the backward pass changes saved tensors that are not ``Donated``, or reads
        one that it has overwritten.
        """
        case = self._case(random_ids(self.tile + 1, 4, 2), 4)
        leaves = [tensor for tensor in case.tensors.values() if tensor.requires_grad]
        y = self._kernel(case)(case)
        grad = partial(torch.autograd.grad, y, leaves, case.dy)
        first, second, last = grad(retain_graph=True), grad(retain_graph=True), grad()
        for grads in (second, last):
            same = all(map(torch.equal, first, grads))
            assert same, "a later backward pass over the same graph gives other gradients"

    def test_compiles_whole(self, record_property: Any) -> None:
        """``torch.compile(fullgraph=True)`` gives the same results for two token counts.

        If this fails with a graph break, register the kernel as an operator
        (``register_experts_op``).
        """
        torch.compiler.reset()
        case = self._case(random_ids(13, 4, 2), 4, bias=True)
        kernel = self._kernel(case)
        compiled = torch.compile(kernel.call, fullgraph=True, backend="aot_eager")
        for ids in (case.ids, random_ids(9, 4, 2)):
            again = make_case(case.workload, ids)
            got = self._results(again, lambda c: compiled(c.tensors, c.ids))
            self._judge(got, self._expected(again), record_property)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_adds_to_sums(self, dtype: torch.dtype, record_property: Any) -> None:
        """A kernel with `adds_to_sums` adds weight gradients to what is there, in its dtype.

        It returns none of them to autograd. An expert without tokens leaves its sums alone.
        """
        ids = random_ids(self.tile + 3, 3, 2)
        case = self._case(ids, 4, dtype=dtype)
        got = self._summed(case)
        self._judge(got, self._expected_sums(case), record_property)
        assert torch.equal(got["d up"][3], torch.ones_like(got["d up"][3]))

    def test_adds_to_sums_when_compiled(self, record_property: Any) -> None:
        """``torch.compile(fullgraph=True)`` adds as well."""
        torch.compiler.reset()
        case = self._case(random_ids(13, 4, 2), 4)
        got = self._summed(case, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
        self._judge(got, self._expected_sums(case), record_property)

    def test_custom_ops_pass_opcheck(self) -> None:
        """All custom ops of the kernel pass ``torch.library.opcheck``.

        It checks the schema, the fake kernel and the autograd registration. If this fails, an op
        returns other shapes or dtypes than its fake kernel, or changes an input.
        """
        case = self._case(random_ids(7, 4, 2), 4, bias=True)
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
        """Return the workload with a dtype and bias that the backend supports."""
        for bias, dtype in product(dict.fromkeys((workload.bias, False)), DTYPES[1:]):
            candidate = replace(workload, bias=bias, dtype=dtype)
            if self.offered().unusable(candidate) is None:
                return candidate
        return workload

    def _kernel(self, case: Case) -> Call:
        permutation = TorchPermutation(case.workload)
        kernel = self.construct(case.workload, permutation, workload=case.workload)
        return Call(kernel, permutation, case.workload)

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

    def _summed(self, case: Case, wrap: Any = lambda call: call) -> dict[str, Tensor]:
        """Return the results of two passes, with the sums of up and down from 1 as gradients."""
        kernel = self._kernel(case)
        if not getattr(kernel.kernel, "adds_to_sums", False):
            pytest.skip(f"{self.backend} adds to no sums")
        call = wrap(kernel.with_sums)
        leaves = {name: t for name, t in case.tensors.items() if t.requires_grad}
        wide = logits_dtype(case.workload.dtype)
        sums = GradientSums(
            *(torch.ones_like(case.tensors[name], dtype=wide) for name in GradientSums._fields)
        )
        with poisoned_memory():
            for _ in range(2):
                y = call(case.tensors, case.ids, sums)
                grads = torch.autograd.grad(y, list(leaves.values()), case.dy, allow_unused=True)
        got = dict(zip(leaves, grads))
        returned = [name for name in GradientSums._fields if got[name] is not None]
        assert not returned, f"autograd got gradients that were added: {', '.join(returned)}"
        got |= sums._asdict()
        return {"y": y.detach()} | {f"d {name}": grad for name, grad in got.items()}

    def _expected_sums(self, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what `_summed` should return, by plain code and by the oracle."""
        wide = logits_dtype(case.workload.dtype)
        plain, oracle = self._expected(case)
        for results in (plain, oracle):
            for name in ("d up", "d down"):
                gradient = results[name].to(wide) if results is plain else results[name]
                results[name] = 1 + 2 * gradient
        return plain, oracle

    def _expected(self, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the results of plain torch code in the case's dtype, and of the float64 oracle."""
        plain = self._results(case, self._oracle)
        return plain, self._results(case.to(torch.float64), self._oracle)

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
