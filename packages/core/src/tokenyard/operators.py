"""Python functions as torch operators: one call to autograd and the compiler, however many launches are inside.

``torch.library.custom_op`` does the same, but its first call imports the compiler, which takes a process 1 to 3 seconds
that it may not need, and each later call costs the host some microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(
    name: str, schema: str | None = None, device: str = "default"
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a function the operator `name`, such as ``acme::plan``, and returns that.

    The function must neither change its arguments nor return one of them or a view. `schema` is inferred from the
    annotations where it is left out; `device` restricts the operator to one type of device ("cpu"). Give the result to
    ``torch.library.register_fake`` and, if it is differentiable, ``torch.library.register_autograd``.
    """

    def register(compute: Callable[..., Any]) -> Any:
        signature = schema or torch.library.infer_schema(compute, mutates_args=())
        torch.library.define(name, signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, device, compute)
        namespace, _, own_name = name.partition("::")
        return getattr(getattr(torch.ops, namespace), own_name).default

    return register


def refuse_second_derivative(backend: str, instead: str = "torch") -> None:
    """Raise RuntimeError in a backward pass that will itself be differentiated (``create_graph=True``).

    Call it first in the backward function of an operator whose gradient operator has no gradient: without it, second
    derivatives would be wrong in silence. `instead` is a backend of that kind whose gradients can be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"gradients of {backend!r} cannot be differentiated (create_graph=True); those of {instead!r} can"
        )
