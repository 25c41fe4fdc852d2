"""Register an expert kernel as a torch operator with schema, fake kernels and autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tokenyard.interfaces import ExpertWeights, Plan
from tokenyard.operators import operator, refuse_second_derivative

_INPUTS = (
    "Tensor x, Tensor order, Tensor inverse, Tensor offsets, Tensor? topk_weights, "
    "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, int top_k, str activation"
)
_TENSORS = 9  # the number of tensors in _INPUTS; they come first
_DIFFERENTIABLE = (0, 4, 5, 6, 7, 8)  # position in _INPUTS of each field of ExpertGradients
_TYPES = {str: "str", int: "int", float: "float", bool: "bool"}


class ExpertNeeds(NamedTuple):
    """The gradients that a backward pass must compute."""

    x: bool
    topk_weights: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool


class ExpertGradients(NamedTuple):
    """The gradients of an expert layer, each with the shape of its tensor; None if not needed."""

    x: Tensor | None = None  # [T, D]
    topk_weights: Tensor | None = None  # [T, K]
    up: Tensor | None = None  # [E, 2F or F, D]
    down: Tensor | None = None  # [E, D, F]
    up_bias: Tensor | None = None  # [E, 2F or F]
    down_bias: Tensor | None = None  # [E, D]


class ExpertsCall(NamedTuple):
    """The inputs of a forward pass. The backward pass gets the same ones."""

    x: Tensor  # [T, D]
    plan: Plan
    topk_weights: Tensor | None  # [T, K]
    weights: ExpertWeights
    activation: str


Forward = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> y [T, D], then the tensors to save for the backward pass.

It must not change or return a tensor of the call.
"""

Backward = Callable[..., ExpertGradients]
"""``(dy, call, saved, needs, **options)`` -> the gradients that are needed.

dy [T, D] may be strided. `saved` is the list of tensors that the forward pass returned after y. It
must not change or return a tensor of its arguments.
"""

Saved = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> uninitialised tensors with the shapes and dtypes that are saved.

It may read shapes and dtypes only: the tensors of the call can be fake tensors.
"""


def register_experts_op(
    name: str,
    forward: Forward,
    backward: Backward,
    saved: Saved,
    saves: int = 1,
    options: dict[str, type] | None = None,
    device: str = "default",
) -> Callable[..., Tensor]:
    """Register an expert kernel as the operators `name` and `name`_backward (``acme::experts``).

    `saves` is the number of tensors that `forward` returns after y, and that `saved` returns.
    `options` are further arguments of all three functions: name -> type (str, int, float or bool).
    `device` restricts the kernel to one type of device.

    Returns the function ``(x, plan, topk_weights, weights, activation, **options) -> y [T, D]``.
    It supports autograd (once differentiable), torch.compile and fake tensors. Selective recompute
    keeps y and the saved tensors.
    """
    types = options or {}
    kernel = _Kernel(forward, backward, saved, tuple(types))
    inputs = _INPUTS + "".join(f", {_TYPES[kind]} {option}" for option, kind in types.items())
    outputs = "Tensor" + ", Tensor" * saves

    op = operator(name, f"({inputs}) -> ({outputs})", device, kept=True)(kernel.compute)
    op.fake(kernel.fake)

    gradient_inputs = f"Tensor dy, Tensor[] saved, bool[] needs, {inputs}"
    gradient_op = operator(f"{name}_backward", f"({gradient_inputs}) -> Tensor[]", device)(
        kernel.gradients
    )
    gradient_op.fake(kernel.fake_gradients)

    differentiate = partial(_differentiate, name, gradient_op)
    op.differentiable(differentiate, _save)
    return _caller(op, kernel.options)


@dataclass(frozen=True)
class _Kernel:
    """A kernel's functions, adapted to the flat arguments of operators (`_INPUTS`, options)."""

    forward: Forward
    backward: Backward
    saved: Saved
    options: tuple[str, ...]  # names, in the order of the arguments

    def compute(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, options = self._unflatten(arguments)
        return self.forward(call, **options)

    def fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, options = self._unflatten(arguments)
        return call.x.new_empty(call.x.shape), *self.saved(call, **options)

    def gradients(
        self, dy: Tensor, saved: list[Tensor], needs: list[bool], *arguments: Any
    ) -> list[Tensor]:
        call, options = self._unflatten(arguments)
        gradients = self.backward(dy, call, saved, ExpertNeeds(*needs), **options)
        # an operator's list of tensors cannot hold None
        return [dy.new_empty(0) if gradient is None else gradient for gradient in gradients]

    def fake_gradients(
        self, dy: Tensor, saved: list[Tensor], needs: list[bool], *arguments: Any
    ) -> list[Tensor]:
        call, _ = self._unflatten(arguments)
        likes = _likes(call)
        return [like.new_empty(like.shape if need else 0) for like, need in zip(likes, needs)]

    def _unflatten(self, arguments: tuple[Any, ...]) -> tuple[ExpertsCall, dict[str, Any]]:
        x, order, inverse, offsets, topk_weights = arguments[:5]
        weights = ExpertWeights(*arguments[5:_TENSORS])
        top_k, activation, *option_values = arguments[_TENSORS:]
        plan = Plan(order, inverse, offsets, top_k)
        call = ExpertsCall(x, plan, topk_weights, weights, activation)
        return call, dict(zip(self.options, option_values))


def _likes(call: ExpertsCall) -> tuple[Tensor, ...]:
    """Return a tensor with the shape and dtype of each gradient, in the order of ExpertNeeds.

    Without topk_weights, their gradient is never needed, and any tensor does.
    """
    up = call.weights.up
    down = call.weights.down
    topk_weights = call.x if call.topk_weights is None else call.topk_weights
    up_bias = up.new_empty(up.shape[:2])
    down_bias = down.new_empty(down.shape[:2])
    return call.x, topk_weights, up, down, up_bias, down_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the inputs and the saved outputs for the backward pass."""
    ctx.mark_non_differentiable(*output[1:])
    # else autograd allocates a zero gradient for each saved tensor
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.constants = inputs[_TENSORS:]


def _differentiate(
    name: str, gradient_op: Callable[..., list[Tensor]], ctx: Any, dy: Tensor | None, *unused: None
) -> tuple[Tensor | None, ...]:
    """Return a gradient, or None, for each input; dy [T, D] is None if y is unused."""
    refuse_second_derivative(name, "loop")
    result: list[Tensor | None] = [None] * (_TENSORS + len(ctx.constants))
    if dy is None:
        return tuple(result)
    tensors = ctx.saved_tensors
    inputs = tensors[:_TENSORS]
    saved = list(tensors[_TENSORS:])
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    gradients = gradient_op(dy, saved, needs, *inputs, *ctx.constants)
    for position, gradient, need in zip(_DIFFERENTIABLE, gradients, needs):
        result[position] = gradient if need else None
    return tuple(result)


def _caller(op: Any, options: tuple[str, ...]) -> Callable[..., Tensor]:
    """Return the function that calls an operator with a Plan and ExpertWeights."""

    def call(
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        activation: str,
        **values: Any,
    ) -> Tensor:
        order, inverse, offsets, top_k = plan
        constants = (top_k, activation, *(values[option] for option in options))
        y: Tensor = op(x, order, inverse, offsets, topk_weights, *weights, *constants)[0]
        return y

    return call
