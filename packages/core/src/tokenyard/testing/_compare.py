"""Comparing with a float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard.numerics import allowed_error, relative_error


def assert_close(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that each result is as near to the oracle as twice what plain torch code is, plus eps.

    The eps is that of `dtype`, which was computed in, or of the result: a lone gate gradient, kept in float32 but made
    of bfloat16 numbers, may be off by their rounding although plain code happens to hit it.
    """
    for name, want in oracle.items():
        error, allowed = relative_error(got[name], want), allowed_error(plain[name], want, dtype)
        assert got[name].dtype == plain[name].dtype, (
            f"{name} is {got[name].dtype}, not {plain[name].dtype}"
        )
        assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN (or the largest integer), so that none is returned unwritten."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class CustomOps(TorchDispatchMode):
    """Records every custom op that runs inside, for ``torch.library.opcheck``: the op, its arguments, and whether

    autograd was on, so that its gradient is wanted (it is off in a backward pass).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and note it if it is not one of torch's own."""
        if func.namespace not in ("aten", "prim", "prims", "inductor", "c10d", "_c10d_functional"):
            self.calls.append((func, args, kwargs or {}, torch.is_grad_enabled()))
        return func(*args, **(kwargs or {}))


def fresh(argument: Any, differentiable: bool) -> Any:
    """Return an argument that was recorded as a leaf of its own, requiring grad if it can and should."""
    if isinstance(argument, Tensor):
        return (
            argument.detach()
            .clone()
            .requires_grad_(differentiable and argument.is_floating_point())
        )
    return argument
