"""Copies of tensors that kernels cannot read in place."""

from __future__ import annotations

from torch import Tensor


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor, or None for None."""
    return None if tensor is None else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor whose address is a multiple of 16, as TMA requires."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
