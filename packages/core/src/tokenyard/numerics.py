"""Which dtype to compute in, and how far from float64 a result may be."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return what a product of x is computed in: autocast's dtype where autocast is on, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


ORACLE_ERROR = 64 * torch.finfo(torch.float64).eps
"""The oracle is float64 itself, so that nothing can be asked to come nearer to it than its own rounding."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in float64 by Frobenius norm; 0 if both are all zero, inf if only one is."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    norm, difference = want.norm(), (got - want).norm()
    return (difference / norm).item() if norm > 0 else (0.0 if difference == 0 else float("inf"))


def allowed_error(plain: Tensor, oracle: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return the relative error that a result may have: twice that of plain torch code in its dtype, plus eps.

    The eps is that of `dtype`, if given: of what was computed in, where the result is kept in a wider one.
    """
    eps = torch.finfo(dtype or plain.dtype).eps * (
        1 + 4 / max(1, oracle.numel()) ** 0.5
    )  # few numbers fluctuate more
    return max(2 * relative_error(plain, oracle) + eps, ORACLE_ERROR)
