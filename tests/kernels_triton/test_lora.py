"""Experts with adapters, computed by the kernels: equal to W x + s B A x in float64."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tokenyard import LoraSettings, MoE, Workload, add_lora
from tokenyard.activations import activate, up_rows
from tokenyard.interfaces import ExpertWeights, LowRank, Plan
from tokenyard.testing._compare import CustomOps, fresh, poisoned_memory
from tokenyard.tolerance import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class Case:
    """A layer's sizes and which parts it has. The last expert has no rows."""

    rank: int
    dtype: torch.dtype = torch.float32
    activation: str = "swiglu"
    targets: tuple[str, ...] = ("up", "down")
    bias: bool = False
    weighted: bool = True
    dropout: bool = False
    base: bool = False  # whether the base has gradients, too
    tail: bool = True  # whether some ids are dropped
    backend: str = "triton"
    sizes: tuple[int, int, int, int] = (40, 48, 40, 5)  # T, D, F, E

    def workload(self) -> Workload:
        _, dim, ffn_dim, experts = self.sizes
        options = {"bias": self.bias, "dtype": self.dtype, "device": DEVICE}
        return Workload(dim, ffn_dim, experts, 2, self.activation, **options)

    def plan(self) -> Plan:
        from tokenyard_kernels_triton.permutation import TritonPermutation

        tokens, _, _, experts = self.sizes
        ids = torch.rand(tokens, experts - 1, device=DEVICE).topk(2).indices.int()
        if self.tail:
            ids[::5, 1] = experts
        return TritonPermutation(self.workload()).plan(ids, experts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the differentiable tensors by name, and `mask`."""
        tokens, dim, ffn_dim, experts = self.sizes
        rows = up_rows(self.activation, ffn_dim)
        shapes = {"x": (tokens, dim), "up": (experts, rows, dim), "down": (experts, dim, ffn_dim)}
        if self.bias:
            shapes |= {"up_bias": (experts, rows), "down_bias": (experts, dim)}
        for name in self.targets:
            _, out, width = shapes[name]
            shapes[f"{name}_a"] = (experts, self.rank, width)
            shapes[f"{name}_b"] = (experts, out, self.rank)
        if self.dropout:
            shapes |= {"dropped": (tokens, dim)}
        tensors = {
            name: torch.randn(shape, device=DEVICE).mul(shape[-1] ** -0.5).to(self.dtype)
            for name, shape in shapes.items()
        }
        if self.dropout:
            tensors["mask"] = torch.rand(tokens * 2, ffn_dim, device=DEVICE) < 0.7
        if self.weighted:
            tensors["topk_weights"] = torch.rand(tokens, 2, device=DEVICE)
        frozen = () if self.base else ("up", "down", "up_bias", "down_bias")
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in ("mask", *frozen))
        return tensors


SCALES = {"up_scale": 2.0, "down_scale": 3.0}


def by_kernels(case: Case, plan: Plan, tensors: dict[str, Tensor]) -> Tensor:
    from tokenyard_kernels_triton import experts

    kernels = {"triton": experts.TritonExperts, "gluon": experts.GluonExperts}
    kernel = kernels[case.backend](case.workload(), None)
    weights = ExpertWeights(*(tensors.get(name) for name in ExpertWeights._fields))
    low_rank = LowRank(*(tensors.get(name) for name in LowRank._fields[:-2]), **SCALES)
    return kernel.with_adapter(tensors["x"], plan, tensors.get("topk_weights"), weights, low_rank)


def by_formula(case: Case, plan: Plan, tensors: dict[str, Tensor]) -> Tensor:
    """Compute one expert after the other by plain torch."""

    def linear(name: str, expert: int, x: Tensor, adapted: Tensor) -> Tensor:
        y = x @ tensors[name][expert].T
        if f"{name}_bias" in tensors:
            y = y + tensors[f"{name}_bias"][expert]
        if name not in case.targets:
            return y
        a, b = (tensors[f"{name}_{one}"][expert] for one in "ab")
        return y + SCALES[f"{name}_scale"] * adapted @ a.T @ b.T

    x = tensors["x"]
    y = torch.zeros_like(x)
    offsets = plan.offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(offsets)):
        slots = plan.order[start:end].long()
        tokens = slots // plan.top_k
        z = linear("up", expert, x[tokens], tensors.get("dropped", x)[tokens])
        a = activate(z, case.activation)
        rows = linear("down", expert, a, a * tensors["mask"][start:end] if case.dropout else a)
        if case.weighted:
            rows = rows * tensors["topk_weights"].flatten()[slots].unsqueeze(1)
        y = y.index_add(0, tokens, rows)
    return y


def results(compute, case: Case, plan: Plan, tensors: dict[str, Tensor], dy) -> dict[str, Tensor]:
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    y = compute(case, plan, tensors)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach()} | {n: g for n, g in zip(leaves, gradients) if g is not None}


CASES = (
    Case(16, base=True, bias=True),
    Case(4, activation="gelu", targets=("up",), weighted=False),
    Case(64, torch.bfloat16, targets=("down",)),
    Case(3, bias=True, dropout=True),
    Case(16, torch.bfloat16, activation="geglu"),
)


def check(case: Case) -> None:
    torch.manual_seed(1)
    plan = case.plan()
    tensors = case.tensors()
    assert not plan.offsets.diff()[-1], "the last expert has no rows"
    dy = torch.randn_like(tensors["x"])
    with poisoned_memory():
        got = results(by_kernels, case, plan, tensors, dy)
        again = results(by_kernels, case, plan, tensors, dy)
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    want = results(by_formula, case, plan, exact, dy)
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert relative_error(got[name], tensor) < TOLERANCE[case.dtype], name
        assert torch.equal(got[name], again[name]), name
        assert got[name].dtype == ({"y": tensors["x"]} | tensors)[name].dtype


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case):
    """New memory holds NaN. A second run has the same bits."""
    check(case)


def test_passes_over_a_retained_graph_read_the_same_pre_activation():
    """The last one writes a gradient in its place."""
    case = Case(4, bias=True)
    plan = case.plan()
    tensors = case.tensors()
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    y = by_kernels(case, plan, tensors)
    grad = partial(torch.autograd.grad, y, leaves, torch.randn_like(y))
    first, second, last = grad(retain_graph=True), grad(retain_graph=True), grad()
    for others in (second, last):
        assert all(map(torch.equal, first, others))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_output_and_gradients_at_a_real_size(backend, case):
    check(replace(case, backend=backend, dtype=torch.bfloat16, sizes=(4096, 1024, 768, 33)))


def namespaces(ops: CustomOps) -> set[str]:
    """Return the namespaces of the operators that computed adapters."""
    return {op.namespace for op, *_ in ops.calls if "lora_experts" in str(op)}


@pytest.mark.parametrize("save", ["pre_activation", "recompute"])
def test_a_layer_gives_its_adapter_to_the_kernel(save):
    """With what the forward pass keeps, and dropout, as an option of the layer."""
    torch.manual_seed(2)
    workload = Workload(32, 32, 4, 2, device=DEVICE)
    x = torch.randn(20, 32, device=DEVICE)
    got = {}
    for name, backend in (("kernel", {"name": "triton", "save": save}), ("core", "torch")):
        torch.manual_seed(3)
        moe = MoE(workload, backends={"experts": backend}).to(DEVICE)
        add_lora(moe, LoraSettings(8, 8.0, dropout=0.3), ["experts.*"])
        for parameter in moe.experts.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with CustomOps() as ops:
            y, _ = moe(x)
        assert ("tokenyard_triton" in namespaces(ops)) == (name == "kernel")
        adapter = list(moe.experts.adapter.parameters())
        got[name] = [y, *torch.autograd.grad(y.sum(), adapter)]
    for one, other in zip(*got.values()):
        assert relative_error(one, other) < 1e-5


def test_dropout_keeps_the_mean_in_16_bits():
    """What is kept counts 1 / 0.9 times, which bfloat16 would round to 0.16 % less."""
    torch.manual_seed(4)
    dtype = torch.bfloat16
    workload = Workload(32, 64, 1, 1, "relu", dtype=dtype, device=DEVICE)
    moe = MoE(workload, backends={"experts": "triton"}, dtype=dtype).to(DEVICE)
    add_lora(moe, LoraSettings(8, 8.0, dropout=0.1), ["experts.down"])
    torch.nn.init.zeros_(moe.experts.down)  # y is the adapter's output alone
    adapter = moe.experts.adapter
    for matrix in (moe.experts.up, adapter.down_a, adapter.down_b):
        torch.nn.init.uniform_(matrix, 0.1, 0.2)
    x = torch.rand(64, 32, device=DEVICE).to(dtype)
    kernel = moe.experts.kernel
    with patch.object(kernel, "with_adapter", side_effect=kernel.with_adapter) as spy:
        y = moe(x)[0]
    kept = spy.call_args[0][4].mask.double()
    up, a, b = (m[0].double() for m in (moe.experts.up, adapter.down_a, adapter.down_b))
    want = (x.double() @ up.T) * kept / 0.9 @ a.T @ b.T
    assert abs(y.double().mean() / want.mean() - 1) < 4e-4
    assert set(kept.unique().tolist()) == {0.0, 1.0}


def test_a_rank_above_the_limit_is_computed_by_core():
    workload = Workload(32, 16, 4, 2, device=DEVICE)
    moe = MoE(workload, backends={"experts": "triton"}).to(DEVICE)
    add_lora(moe, LoraSettings(129, 1.0), ["experts.*"])
    assert moe.experts.kernel.max_lora_rank == 128
    with CustomOps() as ops:
        moe(torch.randn(4, 32, device=DEVICE))
    assert namespaces(ops) == {"tokenyard"}


def test_no_rows():
    case = Case(8, sizes=(0, 32, 16, 4))
    plan = case.plan()
    tensors = case.tensors()
    for name, gradient in results(by_kernels, case, plan, tensors, tensors["x"]).items():
        assert not gradient.any(), name


def test_operators_pass_opcheck():
    """Without a tail, which is undefined in what the forward pass saves."""
    torch.manual_seed(1)
    case = Case(8, sizes=(6, 16, 16, 3), bias=True, dropout=True, tail=False)
    plan = case.plan()
    tensors = case.tensors()
    with CustomOps() as ops:
        results(by_kernels, case, plan, tensors, tensors["x"])
    calls = [call for call in ops.calls if "lora" in str(call[0])]
    assert len(calls) == 2
    for op, arguments, options, differentiable in calls:
        torch.library.opcheck(op, tuple(fresh(a, differentiable) for a in arguments), options)
