"""Comparing with a float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ORACLE_ERROR = 64 * torch.finfo(torch.float64).eps
"""The oracle is float64 itself, so that nothing can be asked to come nearer to it than its own rounding."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in float64 by Frobenius norm; 0 if both are all zero, inf if only one is."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    norm, difference = want.norm(), (got - want).norm()
    return (difference / norm).item() if norm > 0 else (0.0 if difference == 0 else float("inf"))


def assert_close(got: Mapping[str, Tensor], plain: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> None:
    """Assert that each result is as near to the oracle as twice what plain torch code in its dtype is, plus eps."""
    for name, want in oracle.items():
        error, reference = relative_error(got[name], want), relative_error(plain[name], want)
        eps = torch.finfo(got[name].dtype).eps * (1 + 4 / max(1, want.numel()) ** 0.5)  # few numbers fluctuate more
        allowed = max(2 * reference + eps, ORACLE_ERROR)
        assert got[name].dtype == plain[name].dtype, f"{name} is {got[name].dtype}, not {plain[name].dtype}"
        assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e} (plain: {reference:.3e})"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN (or the largest integer), so that none is returned unwritten."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
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
        return argument.detach().clone().requires_grad_(differentiable and argument.is_floating_point())
    return argument
