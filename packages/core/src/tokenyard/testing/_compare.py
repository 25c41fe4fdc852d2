"""Comparison with a float64 oracle, and tools to catch hidden errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard.tolerance import allowed_error, relative_error


def assert_close(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that each error against the oracle is at most twice that of plain code, plus eps.

    The eps is that of the compute `dtype`; the default is the dtype of the result. It matters for a
    single topk_weights gradient, which is in float32 but computed from bfloat16 numbers: plain code
    may have no error by chance.
    """
    for name, want in oracle.items():
        error = relative_error(got[name], want)
        allowed = allowed_error(plain[name], want, dtype)
        assert got[name].dtype == plain[name].dtype, (
            f"{name} is {got[name].dtype}, not {plain[name].dtype}"
        )
        assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context: fill new uninitialised tensors with NaN, or the largest integer.

    So a result that was never written does not pass by chance.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch fills uninitialised memory in its deterministic mode
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class CustomOps(TorchDispatchMode):
    """Context that records the calls of custom ops, for ``torch.library.opcheck``."""

    def __init__(self) -> None:
        super().__init__()
        # (op, args, kwargs, whether autograd is on; it is off in a backward pass)
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and record it if it is not part of torch."""
        if func.namespace not in ("aten", "prim", "prims", "inductor", "c10d", "_c10d_functional"):
            self.calls.append((func, args, kwargs or {}, torch.is_grad_enabled()))
        return func(*args, **(kwargs or {}))


def fresh(argument: Any, differentiable: bool) -> Any:
    """Return a recorded argument as a new leaf tensor, which requires grad if `differentiable`."""
    if not isinstance(argument, Tensor):
        return argument
    leaf = argument.detach().clone()
    return leaf.requires_grad_(differentiable and argument.is_floating_point())
