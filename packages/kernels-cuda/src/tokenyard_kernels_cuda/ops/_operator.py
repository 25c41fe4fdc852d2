"""Functions as custom ops, by which torch sees one call where there are many launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated function, which must not change or return what it is given, the op ``tokenyard_cuda::<name>``.

    ``torch.library.custom_op`` does so, too, but its first call imports the compiler, 1 to 3 seconds of a process that
    may need none of it, and each later call costs the host some microseconds more.
    """

    def register(compute: Callable[..., Any]) -> Any:
        qualified = f"tokenyard_cuda::{name}"
        schema = torch.library.infer_schema(compute, mutates_args=())
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "default", compute)
        return getattr(torch.ops.tokenyard_cuda, name).default

    return register


def only_once() -> None:
    """Refuse, in a backward pass, to be differentiated again: the kernels of gradients have no gradients themselves."""
    if torch.is_grad_enabled():
        raise RuntimeError("gradients of 'cuda' cannot be differentiated (create_graph=True); those of 'torch' can")
