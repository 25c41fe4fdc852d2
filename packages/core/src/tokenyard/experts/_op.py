"""Register an expert kernel as a torch operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from tokenyard.experts._register import FlatKernel, Signature
from tokenyard.interfaces import ExpertWeights, GradientSums, Plan

_TENSORS = (
    "Tensor x, Tensor order, Tensor inverse, Tensor offsets, Tensor? topk_weights, "
    "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"
)
_CONSTANTS = "int top_k, str activation"
_SIGNATURE = Signature(
    f"{_TENSORS}, {_CONSTANTS}",
    tensors=9,
    constants=2,
    differentiable=(0, 4, 5, 6, 7, 8),  # the fields of ExpertGradients
)
_ADDING = Signature(
    f"{_TENSORS}, Tensor up_sum, Tensor down_sum, {_CONSTANTS}",
    tensors=11,
    constants=2,
    differentiable=_SIGNATURE.differentiable,
    sums={5: "up_sum", 6: "down_sum"},
)


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
must not change or return a tensor of its arguments, but may overwrite `saved` if that is Donated.

A kernel that adds has an argument `sums`, which is GradientSums or None. If there are any, it adds
the gradients of up and down that are needed to them, and returns None for both.
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
    adds: bool = False,
) -> Callable[..., Tensor]:
    """Register an expert kernel as the operators `name` and `name`_backward (``acme::experts``).

    `saves` is the number of tensors that `forward` returns after y, and that `saved` returns.
    `options` are further arguments of all three functions: name -> type (str, int, float or bool).
    `device` restricts the kernel to one type of device. `adds` says that `backward` has an argument
    `sums`; then there are two more operators, `name`_adding and `name`_adding_backward.

    Returns the function ``(x, plan, topk_weights, weights, activation, **options) -> y [T, D]``,
    with an optional argument `sums` if the kernel adds. It supports autograd (once differentiable),
    torch.compile and fake tensors. Selective recompute keeps y and the saved tensors.
    """

    options = options or {}
    gradients = _flat(backward, adds)
    kernel = FlatKernel(_SIGNATURE, _read, forward, gradients, saved, options)
    op = kernel.register(name, saves, device)
    if not adds:
        return _caller(op, None, tuple(options))
    kernel = FlatKernel(_ADDING, _read, forward, gradients, saved, options)
    return _caller(op, kernel.register(f"{name}_adding", saves, device), tuple(options))


def _flat(backward: Backward, adds: bool) -> Callable[..., ExpertGradients]:
    """Return a kernel's backward function with flat arguments."""

    def gradients(
        dy: Tensor,
        call: ExpertsCall,
        saved: list[Tensor],
        needs: list[bool],
        *sums: Tensor,
        **options: Any,
    ) -> ExpertGradients:
        if adds:
            options["sums"] = GradientSums(*sums) if sums else None
        return backward(dy, call, saved, ExpertNeeds(*needs), **options)

    return gradients


def _read(arguments: tuple[Any, ...]) -> ExpertsCall:
    x, order, inverse, offsets, topk_weights, *weights, top_k, activation = arguments
    plan = Plan(order, inverse, offsets, top_k)
    return ExpertsCall(x, plan, topk_weights, ExpertWeights(*weights), activation)


def _caller(op: Any, adding: Any, options: tuple[str, ...]) -> Callable[..., Tensor]:
    """Return the function that calls an operator with a Plan and ExpertWeights.

    With `sums`, it calls the operator `adding`.
    """

    def call(
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        activation: str,
        sums: GradientSums | None = None,
        **values: Any,
    ) -> Tensor:
        order, inverse, offsets, top_k = plan
        tensors = (x, order, inverse, offsets, topk_weights, *weights)
        constants = (top_k, activation, *(values[option] for option in options))
        if sums is None:
            y: Tensor = op(*tensors, *constants)[0]
        else:
            y = adding(*tensors, *sums, *constants)[0]
        return y

    return call
