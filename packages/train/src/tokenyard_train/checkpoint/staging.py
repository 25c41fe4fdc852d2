"""Copy tensors to host memory, so that training can change them while the copies are written."""

from __future__ import annotations

from torch import Tensor

from tokenyard.sharded import is_sharded
from tokenyard_train.torch_private import copy_shard_to_host


def stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory. The copy of a sharded tensor holds this rank's shard."""
    return {name: _copy(name, tensor) for name, tensor in tensors.items()}


def _copy(name: str, tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return tensor.detach().to("cpu", copy=True)
    return copy_shard_to_host(name, tensor)
