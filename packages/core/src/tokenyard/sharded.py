"""Helpers for sharded tensors (DTensor) that do not import ``torch.distributed.tensor``.

That import takes up to 2 seconds, and a run in one process never needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return True if a tensor is a DTensor; only DTensors have ``to_local``."""
    # on the type, because the compiler does not see the method on a traced tensor
    return hasattr(type(tensor), "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, and any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def allocate(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Allocate a model of the meta device on `device`, uninitialised; return the model.

    For a sharded model, only the local shards are allocated. Does the same as ``model.to_empty``,
    which imports sympy because it reads the strides of meta tensors.
    """

    def empty(tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            return torch.empty_like(tensor, device=device)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    return model._apply(empty)
