"""Register a kernel with a call of many inputs as an operator with fake kernels and autograd.

An operator has flat arguments: tensors, then constants, then the kernel's options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tokenyard.operators import Operator, operator, refuse_second_derivative

_TYPES = {str: "str", int: "int", float: "float", bool: "bool"}


class Signature(NamedTuple):
    """The arguments of an operator before its options."""

    schema: str
    tensors: int  # they come first
    constants: int
    differentiable: tuple[int, ...]  # positions of the tensors that may have a gradient


@dataclass(frozen=True)
class FlatKernel:
    """A kernel's functions, adapted to the flat arguments of operators."""

    signature: Signature
    read: Callable[[tuple[Any, ...]], Any]  # tensors and constants -> the kernel's call
    forward: Callable[..., tuple[Tensor, ...]]  # (call, **options) -> y, saved tensors
    # (dy, call, saved, needs, **options) -> a gradient, or None, for each differentiable tensor
    backward: Callable[..., Sequence[Tensor | None]]
    saved: Callable[..., tuple[Tensor, ...]]  # (call, **options) -> tensors like the saved ones
    options: Mapping[str, type]  # name -> str, int, float or bool

    def register(self, name: str, saves: int, device: str = "default") -> Operator:
        """Register the operators `name` and `name`_backward; return the first.

        `saves` is the number of tensors that the forward pass saves.
        """
        typed = (f", {_TYPES[kind]} {option}" for option, kind in self.options.items())
        inputs = self.signature.schema + "".join(typed)
        outputs = "Tensor" + ", Tensor" * saves
        op = operator(name, f"({inputs}) -> ({outputs})", device, kept=True)(self._compute)
        op.fake(self._fake)

        inputs = f"Tensor dy, Tensor[] saved, bool[] needs, {inputs}"
        backward = operator(f"{name}_backward", f"({inputs}) -> Tensor[]", device)(self._gradients)
        backward.fake(self._fake_gradients)

        op.differentiable(partial(self._differentiate, name, backward), self._save)
        return op

    def _compute(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, options = self._unflatten(arguments)
        return self.forward(call, **options)

    def _fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, options = self._unflatten(arguments)
        return call.x.new_empty(call.x.shape), *self.saved(call, **options)

    def _gradients(
        self, dy: Tensor, saved: list[Tensor], needs: list[bool], *arguments: Any
    ) -> list[Tensor]:
        call, options = self._unflatten(arguments)
        gradients = self.backward(dy, call, saved, needs, **options)
        # an operator's list of tensors cannot hold None
        return [dy.new_empty(0) if gradient is None else gradient for gradient in gradients]

    def _fake_gradients(
        self, dy: Tensor, saved: list[Tensor], needs: list[bool], *arguments: Any
    ) -> list[Tensor]:
        likes = [arguments[position] for position in self.signature.differentiable]
        return [
            like.new_empty(like.shape) if need else dy.new_empty(0)
            for like, need in zip(likes, needs)
        ]

    def _unflatten(self, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        end = self.signature.tensors + self.signature.constants
        return self.read(arguments[:end]), dict(zip(self.options, arguments[end:]))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the inputs and the saved outputs for the backward pass."""
        ctx.mark_non_differentiable(*output[1:])
        # else autograd allocates a zero gradient for each saved tensor
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: self.signature.tensors], *output[1:])
        ctx.constants = inputs[self.signature.tensors :]

    def _differentiate(
        self, name: str, backward: Operator, ctx: Any, dy: Tensor | None, *unused: None
    ) -> tuple[Tensor | None, ...]:
        """Return a gradient, or None, for each input; dy [T, D] is None if y is unused."""
        refuse_second_derivative(name, "loop")
        count = self.signature.tensors
        result: list[Tensor | None] = [None] * (count + len(ctx.constants))
        if dy is None:
            return tuple(result)
        tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[position] for position in self.signature.differentiable]
        saved = list(tensors[count:])
        gradients = backward(dy, saved, needs, *tensors[:count], *ctx.constants)
        for position, gradient, need in zip(self.signature.differentiable, gradients, needs):
            result[position] = gradient if need else None
        return tuple(result)
