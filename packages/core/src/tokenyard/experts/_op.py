"""An expert kernel as a torch operator with its gradient: schema, fakes and what is saved, written once for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard.interfaces import ExpertWeights, Plan
from tokenyard.operators import operator, refuse_second_derivative

_INPUTS = (
    "Tensor x, Tensor order, Tensor inverse, Tensor offsets, Tensor? topk_weights, "
    "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, int top_k, str activation"
)
_DIFFERENTIABLE = (0, 4, 5, 6, 7, 8)  # positions in _INPUTS of what ExpertGradients has fields for
_TYPES = {str: "str", int: "int", float: "float", bool: "bool"}


class ExpertNeeds(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x: bool
    topk_weights: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool


class ExpertGradients(NamedTuple):
    """The gradients of an expert layer, each shaped like its tensor; None where it was not asked for."""

    x: Tensor | None = None  # [T, D]
    topk_weights: Tensor | None = None  # [T, K]
    up: Tensor | None = None  # [E, 2F or F, D]
    down: Tensor | None = None  # [E, D, F]
    up_bias: Tensor | None = None  # [E, 2F or F]
    down_bias: Tensor | None = None  # [E, D]


class ExpertsCall(NamedTuple):
    """What a forward pass is given, and a backward pass again."""

    x: Tensor  # [T, D]
    plan: Plan
    topk_weights: Tensor | None  # [T, K]
    weights: ExpertWeights
    activation: str


Forward = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> y [T, D], then what the backward pass needs besides the call.

It neither changes nor returns a tensor of the call.
"""

Backward = Callable[..., ExpertGradients]
"""``(dy, call, saved, needs, **options)`` -> the gradients that are needed.

dy [T, D] may be strided, and `saved` is the list of what the forward pass returned after y. It neither changes nor
returns a tensor that it was given.
"""

Saved = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> undefined tensors of the shapes and dtypes that the forward pass saves.

Only shapes count: the tensors of the call may hold no values.
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
    """Register an expert kernel as the operators `name` and `name`_backward, such as ``acme::experts``.

    `saves` is how many tensors `forward` returns after y, and `saved` returns. `options` are further arguments of all
    three functions, by name and type (str, int, float or bool). `device` restricts the kernel to one type of device.

    Returns the function to call: ``(x, plan, topk_weights, weights, activation, **options) -> y [T, D]``. It works
    under autograd (once differentiable), torch.compile and fake tensors.
    """
    names = tuple(options or {})
    declared = "".join(f", {_TYPES[kind]} {option}" for option, kind in (options or {}).items())
    kept = "".join(", Tensor" for _ in range(saves))

    def compute(*arguments: Any) -> tuple[Tensor, ...]:
        call, chosen = _unflatten(arguments, names)
        return forward(call, **chosen)

    def compute_gradients(
        dy: Tensor, keep: list[Tensor], needs: list[bool], *arguments: Any
    ) -> list[Tensor]:
        call, chosen = _unflatten(arguments, names)
        gradients = backward(dy, call, keep, ExpertNeeds(*needs), **chosen)
        return [dy.new_empty(0) if gradient is None else gradient for gradient in gradients]

    op = operator(name, f"({_INPUTS}{declared}) -> (Tensor{kept})", device)(compute)
    gradient_inputs = f"Tensor dy, Tensor[] saved, bool[] needs, {_INPUTS}{declared}"
    gradient_op = operator(f"{name}_backward", f"({gradient_inputs}) -> Tensor[]", device)(
        compute_gradients
    )

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        call, chosen = _unflatten(arguments, names)
        return call.x.new_empty(call.x.shape), *saved(call, **chosen)

    def fake_gradients(
        dy: Tensor, keep: list[Tensor], needs: list[bool], *arguments: Any
    ) -> list[Tensor]:
        call, _ = _unflatten(arguments, names)
        return [
            like.new_empty(like.shape if need else 0) for like, need in zip(_likes(call), needs)
        ]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(
            False
        )  # else autograd fills a gradient of zeros for each saved tensor
        ctx.save_for_backward(*inputs[:9], *output[1:])
        ctx.constants = inputs[9:]

    def differentiate(ctx: Any, dy: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(name, "loop")
        if dy is None:
            return (None,) * (9 + len(ctx.constants))
        tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        gradients = gradient_op(dy, list(tensors[9:]), needs, *tensors[:9], *ctx.constants)
        result: list[Tensor | None] = [None] * (9 + len(ctx.constants))
        for position, gradient, need in zip(_DIFFERENTIABLE, gradients, needs):
            result[position] = gradient if need else None
        return tuple(result)

    torch.library.register_fake(op, fake)
    torch.library.register_fake(gradient_op, fake_gradients)
    torch.library.register_autograd(op, differentiate, setup_context=save)

    def run(
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        activation: str,
        **chosen: Any,
    ) -> Tensor:
        order, inverse, offsets, top_k = plan
        constants = (top_k, activation, *(chosen[option] for option in names))
        y: Tensor = op(x, order, inverse, offsets, topk_weights, *weights, *constants)[0]
        return y

    return run


def _unflatten(
    arguments: tuple[Any, ...], names: tuple[str, ...]
) -> tuple[ExpertsCall, dict[str, Any]]:
    (
        x,
        order,
        inverse,
        offsets,
        topk_weights,
        up,
        down,
        up_bias,
        down_bias,
        top_k,
        activation,
        *rest,
    ) = arguments
    plan = Plan(order, inverse, offsets, top_k)
    weights = ExpertWeights(up, down, up_bias, down_bias)
    return ExpertsCall(x, plan, topk_weights, weights, activation), dict(zip(names, rest))


def _likes(call: ExpertsCall) -> tuple[Tensor, ...]:
    """Return a tensor of the shape and dtype of each gradient; any for topk_weights where there are none."""
    up, down = call.weights.up, call.weights.down
    topk_weights = call.x if call.topk_weights is None else call.topk_weights
    return (
        call.x,
        topk_weights,
        up,
        down,
        up.new_empty(up.shape[:2]),
        down.new_empty(down.shape[:2]),
    )
