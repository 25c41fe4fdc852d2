"""Sharded tensors (DTensor), recognised without importing ``torch.distributed.tensor``.

That import takes up to 2 seconds, and a run in one process never needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Say whether a tensor is a DTensor: only these have a local part.

    The type is asked, since the compiler does not see the method on a traced tensor.
    """
    return hasattr(type(tensor), "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this rank holds: the tensor itself, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def allocate(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a model from the meta device to another one, without values; of a sharded one, what this rank holds.

    It does what ``model.to_empty`` does. That one asks the meta device how a tensor lies, which imports sympy.
    """

    def empty(tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            return torch.empty_like(tensor, device=device)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    return model._apply(empty)
