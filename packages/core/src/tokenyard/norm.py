"""The norm of many tensors together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 24  # numbers


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all elements of tensors on one device, a scalar in float32 at least.

    `torch._foreach_norm` is private: torch 2.10 to 2.13. It launches few kernels for many tensors,
    and takes 1.5 times as long as ``vector_norm`` for large ones on an H200.
    ``nn.utils.get_total_norm`` rounds the norm of 16-bit tensors to 16 bits.
    """
    if not tensors:
        return torch.zeros(())
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    small = [tensor for tensor in tensors if tensor.numel() < _LARGE]
    norms = [torch.linalg.vector_norm(t, dtype=wide) for t in tensors if t.numel() >= _LARGE]
    if small:
        norms += torch._foreach_norm(small, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack(norms))
