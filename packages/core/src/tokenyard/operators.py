"""Register Python functions as torch operators, which autograd and the compiler see as one call.

``torch.library.custom_op`` does the same, but its first call imports the compiler, which takes 1 to
3 seconds per process, and each call goes through torch's dispatcher and back to Python. That takes
some 50 microseconds on the host, as long as three kernel launches. An `Operator` calls the function
directly, outside of compile, modes, profiles and ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # private: torch 2.10 to 2.13
_PLAIN = (Tensor, nn.Parameter)


class Operator:
    """A function that is an operator of torch, such as ``torch.ops.acme.plan``. Call it as usual.

    torch sees a call as the operator under ``torch.compile``, in a dispatch mode (fake tensors,
    selective recompute, counting FLOPs), in a profile, under ``torch.func``, and for meta tensors
    and subclasses. Any other call runs the function itself; autograd sees one node either way.
    ``torch.fx.symbolic_trace`` and function modes see the body: give them ``Operator.op``.
    """

    def __init__(self, op: Any, compute: Callable[..., Any], any_device: bool):
        self.op = op  # the OpOverload
        self.compute = compute
        self.any_device = any_device
        self.apply: Callable[..., Any] | None = None  # of the autograd node of a direct call

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function that returns empty results, from shapes and dtypes alone."""
        return torch.library.register_fake(self.op)(function)

    def differentiable(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """Register the backward pass, as ``torch.library.register_autograd`` does."""
        torch.library.register_autograd(self.op, backward, setup_context=setup_context)
        node = _function(self.op.name(), self.compute, backward, setup_context)
        # skips ``Function.apply``, which searches arguments for wrappers that torch.func left
        self.apply = super(Function, node).apply  # type: ignore[misc]

    def __call__(self, *args: Any) -> Any:
        """Compute the results. Arguments are positional."""
        if _observed() or not self.any_device:
            return self.op(*args)
        needs_gradient = False
        for arg in args:
            if isinstance(arg, Tensor):
                if type(arg) not in _PLAIN or arg.is_meta or _is_wrapped(arg):
                    return self.op(*args)
                needs_gradient = needs_gradient or arg.requires_grad
            elif isinstance(arg, list) and not all(map(_is_constant, arg)):
                return self.op(*args)
        if not torch.is_grad_enabled():
            return self.compute(*args)
        if needs_gradient:
            # without a backward pass of ours, torch decides
            return self.op(*args) if self.apply is None else self.apply(*args)
        with torch.no_grad():
            return self.compute(*args)


def _is_constant(item: Any) -> bool:
    """Return whether an item of a list is a plain tensor without a gradient, or no tensor."""
    return not isinstance(item, Tensor) or (type(item) in _PLAIN and not item.requires_grad)


def _observed() -> bool:
    """Return whether anything must see a call as an operator.

    The functions of ``torch._C`` are private: torch 2.10 to 2.13.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _function(
    name: str,
    compute: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> type[Function]:
    """Return the autograd node of a direct call. It is named like the operator."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = compute(*args)
        setup_context(ctx, args, output)
        return output

    def gradients(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:
        result = backward(ctx, *dys)
        inputs = result if isinstance(result, tuple) else (result,)
        return tuple(None if isinstance(one, list) else one for one in inputs)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    return type(name, (Function,), methods)


def operator(
    name: str, schema: str | None = None, device: str = "default", kept: bool = False
) -> Callable[[Callable[..., Any]], Operator]:
    """Return a decorator that registers a function as the operator `name`, such as ``acme::plan``.

    The function must not change its arguments unless the schema says so, and must not return an
    argument or a view of one.
    The default of `schema` is inferred from the annotations. `device` restricts the operator to one
    type of device ("cpu"). Selective recompute keeps the results of a `kept` operator, and computes
    those of others again (see ``tokenyard.recompute``): keep what a matmul or a sort computes.
    """

    def register(compute: Callable[..., Any]) -> Operator:
        signature = schema or torch.library.infer_schema(compute, mutates_args=())
        torch.library.define(name, signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, device, compute)
        namespace, _, short_name = name.partition("::")
        op = getattr(getattr(torch.ops, namespace), short_name).default
        op.kept = kept
        return Operator(op, compute, device == "default")

    return register


def refuse_second_derivative(backend: str, instead: str = "torch") -> None:
    """Raise RuntimeError if the backward pass is itself differentiated (``create_graph=True``).

    Call it first in the backward function of an operator whose gradient has no gradient. Without
    it, second derivatives are silently wrong. `instead` names a backend of the same kind that has
    second derivatives.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"gradients of {backend!r} cannot be differentiated (create_graph=True); "
            f"those of {instead!r} can"
        )
