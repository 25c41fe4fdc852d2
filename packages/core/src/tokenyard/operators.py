"""Register Python functions as torch operators, which autograd and the compiler see as one call.

``torch.library.custom_op`` does the same, but its first call imports the compiler, which takes 1 to
3 seconds per process, and each later call costs some microseconds more on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(
    name: str, schema: str | None = None, device: str = "default", kept: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that registers a function as the operator `name`, such as ``acme::plan``.

    The function must not change its arguments unless the schema says so, and must not return an
    argument or a view of one.
    The default of `schema` is inferred from the annotations. `device` restricts the operator to one
    type of device ("cpu"). Selective recompute keeps the results of a `kept` operator, and computes
    those of others again (see ``tokenyard.recompute``): keep what a matmul or a sort computes.

    The decorator returns the operator. Pass it to ``torch.library.register_fake`` and, if it is
    differentiable, to ``torch.library.register_autograd``.
    """

    def register(compute: Callable[..., Any]) -> Any:
        signature = schema or torch.library.infer_schema(compute, mutates_args=())
        torch.library.define(name, signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, device, compute)
        namespace, _, short_name = name.partition("::")
        op = getattr(getattr(torch.ops, namespace), short_name).default
        op.kept = kept
        return op

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
