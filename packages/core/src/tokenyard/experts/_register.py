"""Register a kernel with a call of many inputs as an operator with fake kernels and autograd.

An operator has flat arguments: tensors, then constants, then the kernel's options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tokenyard.operators import Operator, operator, refuse_second_derivative

_TYPES = {str: "str", int: "int", float: "float", bool: "bool"}


class Donated(list[Tensor]):
    """Saved tensors that a backward pass may overwrite: no later pass reads them.

    torch's compiler calls tensors so donated buffers. An operator that runs through torch's
    dispatcher gets a plain list instead, as its schema promises to change nothing.
    """


class Signature(NamedTuple):
    """The arguments of an operator before its options."""

    schema: str
    tensors: int  # they come first
    constants: int
    differentiable: tuple[int, ...]  # positions of the tensors that may have a gradient
    # Position of a tensor -> name of the tensor that its gradient is added to, instead of returned.
    # The tensors with these names are the last ones, and are not part of the kernel's call.
    sums: Mapping[int, str] = MappingProxyType({})

    @property
    def inputs(self) -> int:
        """How many tensors come before the sums."""
        return self.tensors - len(self.sums)

    @property
    def returned(self) -> tuple[int, ...]:
        """Positions in `differentiable` of the gradients that the backward pass returns."""
        return tuple(
            index for index, position in enumerate(self.differentiable) if position not in self.sums
        )

    @property
    def mutating_schema(self) -> str:
        """The arguments, with those that the backward pass adds to marked as changed."""
        schema = self.schema
        for index, name in enumerate(self.sums.values()):
            schema = schema.replace(f"Tensor {name}", f"Tensor(a{index}!) {name}")
        return schema


@dataclass(frozen=True)
class FlatKernel:
    """A kernel's functions, adapted to the flat arguments of operators."""

    signature: Signature
    read: Callable[[tuple[Any, ...]], Any]  # tensors and constants -> the kernel's call
    forward: Callable[..., tuple[Tensor, ...]]  # (call, **options) -> y, saved tensors
    # (dy, call, saved, needs, *sums, **options) -> a gradient, or None, for each differentiable
    # tensor
    backward: Callable[..., Sequence[Tensor | None]]
    saved: Callable[..., tuple[Tensor, ...]]  # (call, **options) -> tensors like the saved ones
    options: Mapping[str, type]  # name -> str, int, float or bool

    def register(self, name: str, saves: int, device: str = "default") -> Operator:
        """Register the operators `name` and `name`_backward; return the first.

        `saves` is the number of tensors that the forward pass saves.
        """
        options = "".join(f", {_TYPES[kind]} {option}" for option, kind in self.options.items())
        inputs = self.signature.schema + options
        outputs = "Tensor" + ", Tensor" * saves
        op = operator(name, f"({inputs}) -> ({outputs})", device, kept=True)(self._compute)
        op.fake(self._fake)

        inputs = f"Tensor dy, Tensor[] saved, bool[] needs, {self.signature.mutating_schema}"
        # The compiler knows no operator that changes an argument and returns a list
        outputs = ", ".join(["Tensor"] * len(self.signature.returned))
        schema = f"({inputs}{options}) -> ({outputs})"
        backward = operator(f"{name}_backward", schema, device)(self._gradients)
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
    ) -> tuple[Tensor, ...]:
        call, options = self._unflatten(arguments)
        sums = arguments[self.signature.inputs : self.signature.tensors]
        if isinstance(saved, Donated):  # another node that saved one too then refuses to run
            increment_version(saved)
        all_gradients = self.backward(dy, call, saved, needs, *sums, **options)
        gradients = [all_gradients[index] for index in self.signature.returned]
        # an operator cannot return None
        return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in gradients)

    def _fake_gradients(
        self, dy: Tensor, saved: list[Tensor], needs: list[bool], *arguments: Any
    ) -> tuple[Tensor, ...]:
        likes = [arguments[position] for position in self.signature.differentiable]
        return tuple(
            likes[index].new_empty(likes[index].shape) if needs[index] else dy.new_empty(0)
            for index in self.signature.returned
        )

    def _unflatten(self, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        constants = arguments[self.signature.tensors :]
        options = dict(zip(self.options, constants[self.signature.constants :]))
        inputs = arguments[: self.signature.inputs] + constants[: self.signature.constants]
        return self.read(inputs), options

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the inputs and the saved outputs for the backward pass."""
        ctx.mark_non_differentiable(*output[1:])
        # else autograd allocates a zero gradient for each saved tensor
        ctx.set_materialize_grads(False)
        # A sum is not saved: backward passes change it, and a saved tensor must not change
        end = self.signature.inputs
        ctx.save_for_backward(*inputs[:end], *output[1:])
        ctx.others = inputs[end:]

    def _differentiate(
        self, name: str, backward: Operator, ctx: Any, dy: Tensor | None, *unused: None
    ) -> tuple[Tensor | None, ...]:
        """Return a gradient, or None, for each input; dy [T, D] is None if y is unused."""
        refuse_second_derivative(name, "loop")
        count = self.signature.inputs
        result: list[Tensor | None] = [None] * (count + len(ctx.others))
        if dy is None:
            return tuple(result)
        tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[position] for position in self.signature.differentiable]
        saved = _donated(tensors[count:])
        gradients = backward(dy, saved, needs, *tensors[:count], *ctx.others)
        for index, gradient in zip(self.signature.returned, gradients, strict=True):
            result[self.signature.differentiable[index]] = gradient if needs[index] else None
        return tuple(result)


def _donated(saved: Sequence[Tensor]) -> list[Tensor]:
    """Return saved tensors as a list: Donated, unless the graph is retained for another pass."""
    if torch._C._autograd._get_current_graph_task_keep_graph():  # private: torch 2.10 to 2.13
        return list(saved)
    return Donated(saved)
