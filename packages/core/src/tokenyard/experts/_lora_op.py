"""Register a kernel of experts with adapters as a torch operator with fake kernels and autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tokenyard.experts._lora_call import LoraCall, lora_call
from tokenyard.interfaces import ExpertWeights, LowRank, Plan
from tokenyard.operators import operator, refuse_second_derivative

TENSORS = (
    "x",
    "order",
    "inverse",
    "offsets",
    "topk_weights",
    "up",
    "down",
    "up_bias",
    "down_bias",
    "up_a",
    "up_b",
    "down_a",
    "down_b",
    "dropped",
    "mask",
)
"""The tensors of a call, in the order of the operator's arguments."""

_DIFFERENTIABLE = (0, *range(4, 14))  # positions in TENSORS
_REQUIRED = ("x", "order", "inverse", "offsets", "up", "down")
_CONSTANTS = "int top_k, float scale, str activation"
_INPUTS = len(TENSORS) + 3  # of every operator; options follow

Forward = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> y [T, D], then the tensors to save for the backward pass.

It must not change or return a tensor of the call.
"""

Backward = Callable[..., dict[str, Tensor]]
"""``(dy, call, saved, wanted, **options)`` -> the gradients of the tensors named in `wanted`.

dy [T, D] may be strided. `saved` is the list of tensors that the forward pass returned after y. It
must not change or return a tensor of its arguments.
"""

Saved = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> uninitialised tensors with the shapes and dtypes that are saved."""


def register_lora_op(
    name: str, forward: Forward, backward: Backward, saved: Saved, saves: int, options: list[str]
) -> Callable[..., Tensor]:
    """Register a kernel of experts with adapters as the operators `name` and `name`_backward.

    `saves` is the number of tensors that `forward` returns after y, and that `saved` returns.
    `options` are further arguments of all three functions, each a string.

    Returns the function ``(x, plan, topk_weights, weights, low_rank, activation, **options) -> y``
    with y [T, D]. It supports autograd (once differentiable), torch.compile and fake tensors.
    Selective recompute keeps y and the saved tensors.
    """
    kernel = _Kernel(forward, backward, saved, tuple(options))
    tensors = (f"Tensor{'' if one in _REQUIRED else '?'} {one}" for one in TENSORS)
    inputs = ", ".join((*tensors, _CONSTANTS, *(f"str {option}" for option in options)))

    outputs = "Tensor" + ", Tensor" * saves
    op = operator(name, f"({inputs}) -> ({outputs})", kept=True)(kernel.compute)
    op.fake(kernel.fake)

    gradient_inputs = f"Tensor dy, Tensor[] saved, bool[] needs, {inputs}"
    gradient_op = operator(f"{name}_backward", f"({gradient_inputs}) -> Tensor[]")(kernel.gradients)
    gradient_op.fake(kernel.fake_gradients)

    differentiate = partial(_differentiate, name, gradient_op)
    op.differentiable(differentiate, _save)
    return partial(_call, op, kernel.options)


@dataclass(frozen=True)
class _Kernel:
    """A kernel's functions, adapted to the flat arguments of operators."""

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
        names = [TENSORS[i] for i in _DIFFERENTIABLE]
        wanted = {name for name, need in zip(names, needs) if need}
        gradients = self.backward(dy, call, saved, wanted, **options)
        # An operator's list of tensors cannot hold None.
        return [gradients[name] if name in wanted else dy.new_empty(0) for name in names]

    def fake_gradients(
        self, dy: Tensor, saved: list[Tensor], needs: list[bool], *arguments: Any
    ) -> list[Tensor]:
        likes = [arguments[i] for i in _DIFFERENTIABLE]
        return [
            like.new_empty(like.shape) if need else dy.new_empty(0)
            for like, need in zip(likes, needs)
        ]

    def _unflatten(self, arguments: tuple[Any, ...]) -> tuple[LoraCall, dict[str, Any]]:
        return lora_call(arguments[:_INPUTS]), dict(zip(self.options, arguments[_INPUTS:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(TENSORS)], *output[1:])
    ctx.constants = inputs[len(TENSORS) :]


def _differentiate(
    name: str, gradient_op: Callable[..., list[Tensor]], ctx: Any, dy: Tensor | None, *unused: None
) -> tuple[Tensor | None, ...]:
    """Return a gradient, or None, for each input; dy [T, D] is None if y is unused."""
    refuse_second_derivative(name, "loop")
    result: list[Tensor | None] = [None] * (len(TENSORS) + len(ctx.constants))
    if dy is None:
        return tuple(result)
    tensors = ctx.saved_tensors
    inputs = tensors[: len(TENSORS)]
    saved = list(tensors[len(TENSORS) :])
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    gradients = gradient_op(dy, saved, needs, *inputs, *ctx.constants)
    for position, gradient, need in zip(_DIFFERENTIABLE, gradients, needs):
        result[position] = gradient if need else None
    return tuple(result)


def _call(
    op: Any,
    options: tuple[str, ...],
    x: Tensor,
    plan: Plan,
    topk_weights: Tensor | None,
    weights: ExpertWeights,
    low_rank: LowRank,
    activation: str,
    **values: Any,
) -> Tensor:
    """Call an operator with the flat arguments of a call."""
    order, inverse, offsets, top_k = plan
    *matrices, scale = low_rank
    constants = (top_k, scale, activation, *(values[option] for option in options))
    tensors = (x, order, inverse, offsets, topk_weights, *weights, *matrices)
    y: Tensor = op(*tensors, *constants)[0]
    return y
