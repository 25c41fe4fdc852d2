"""Relative errors against float64, and the tolerance for them."""

from __future__ import annotations

import torch
from torch import Tensor

ORACLE_ERROR = 64 * torch.finfo(torch.float64).eps
"""The smallest tolerance. The oracle is itself in float64 and has rounding errors of this size."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in float64, with Frobenius norms.

    Returns 0 if both are zero. Returns inf if only `want` is zero, if `got` is not finite, or if
    the shapes differ.
    """
    got = got.detach().double()
    want = want.detach().double()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    norm = want.norm()
    difference = (got - want).norm()
    if norm > 0:
        return (difference / norm).item()
    return 0.0 if difference == 0 else float("inf")


def allowed_error(plain: Tensor, oracle: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return the tolerance of a relative error: twice the error of plain torch code, plus eps.

    `dtype` is the compute dtype, whose eps counts; the default is the dtype of `plain`. Pass it if
    the result is kept in a wider dtype.
    """
    # the norm of few numbers varies more, so small tensors get a larger eps
    eps = torch.finfo(dtype or plain.dtype).eps * (1 + 4 / max(1, oracle.numel()) ** 0.5)
    return max(2 * relative_error(plain, oracle) + eps, ORACLE_ERROR)
