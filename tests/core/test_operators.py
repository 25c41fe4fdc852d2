"""Operators: what a direct call and the registered operator have in common."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard.operators import operator, refuse_second_derivative

NAME = "tokenyard_tests::scaled_cube"


@operator(NAME)
def cube(x: torch.Tensor, others: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Return scale * x^3, plus the others."""
    return sum(others, scale * x * x * x)


@cube.fake
def _(x, others, scale):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    x, others, ctx.scale = inputs
    ctx.count = len(others)
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    refuse_second_derivative("cube")
    (x,) = ctx.saved_tensors
    return 3 * ctx.scale * x * x * dy, [None] * ctx.count, None


cube.differentiable(_backward, _save)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def x():
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def test_a_direct_call_equals_the_operator(x):
    others = [torch.randn(3, 4)]
    values = []
    for call in (cube, cube.op):
        y = call(x, others, 2.0)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        values.append((y, gradient))
    (y, gradient), (want, want_gradient) = values
    assert torch.equal(y, want)
    assert torch.equal(gradient, want_gradient)
    assert torch.equal(gradient, 6 * x * x)


def test_autograd_sees_one_node(x):
    assert cube(x, [], 2.0).grad_fn.name().startswith(NAME)
    assert cube(x.detach(), [], 2.0).grad_fn is None
    with torch.no_grad():
        assert cube(x, [], 2.0).grad_fn is None


def test_the_operator_is_seen_by_whatever_observes_operators(x):
    with Names() as mode:
        cube(x, [], 2.0)
    assert NAME in mode.seen
    with torch.profiler.profile() as profile:
        cube(x, [], 2.0)
    assert NAME in {event.key for event in profile.key_averages()}
    with torch._subclasses.FakeTensorMode() as mode:
        assert cube(mode.from_tensor(x), [], 2.0).shape == (3, 4)


def test_subclasses_and_lists_with_gradients_go_to_the_operator(x):
    with torch.no_grad():
        assert torch.equal(cube(x.as_subclass(Subclass), [], 2.0), cube(x, [], 2.0))
    node = cube(x, [x], 2.0).grad_fn
    assert type(node) is type(cube.op(x, [x], 2.0).grad_fn)


def test_compiles_to_the_operator(x):
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: cube(x, [], 2.0), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), cube(x, [], 2.0))
    assert "tokenyard_tests.scaled_cube.default" in targets


def test_a_second_derivative_is_refused(x):
    y = cube(x, [], 2.0).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(y, x, create_graph=True)


@operator("tokenyard_tests::twice")
def twice(x: torch.Tensor) -> torch.Tensor:
    """Return 2 * x, as a kernel that reads memory would."""
    x.data_ptr()
    return 2 * x


twice.fake(torch.empty_like)
twice.differentiable(lambda ctx, dy: 2 * dy, lambda ctx, inputs, output: None)


def test_a_tensor_that_torch_func_left_behind_goes_to_the_operator(x):
    """It is a wrapper without memory, which only the operator removes."""
    left_behind = []

    def total(inner):
        left_behind.append(inner)
        return inner.sum()

    torch.func.grad(total)(x)
    assert torch.equal(twice(left_behind[0]), 2 * x)


def test_without_a_backward_pass_of_ours_torch_decides(x):
    @operator("tokenyard_tests::doubled")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert doubled(x).requires_grad == doubled.op(x).requires_grad
    assert not doubled(x.detach()).requires_grad


def test_meta_tensors_do_not_reach_the_function():
    assert cube(torch.empty(3, 4, device="meta"), [], 2.0).shape == (3, 4)
    with pytest.raises(AssertionError, match="ran"):
        runs(torch.empty(2))
    assert runs(torch.empty(2, device="meta")).device.type == "meta"


@operator("tokenyard_tests::runs")
def runs(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the function ran")


runs.fake(torch.empty_like)


def test_opcheck(x):
    torch.library.opcheck(cube.op, (x, [torch.randn(3, 4)], 2.0))
