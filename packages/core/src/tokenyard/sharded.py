"""Helpers for sharded tensors (DTensor) that do not import ``torch.distributed.tensor``.

That import takes up to 2 seconds, and a run in one process never needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from tokenyard.devices import device_memory
from tokenyard.errors import ConfigError
from tokenyard.units import describe_bytes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Storage size calculation overflowed",
)

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return True if a tensor is a DTensor; only DTensors have ``to_local``."""
    # on the type, because the compiler does not see the method on a traced tensor
    return hasattr(type(tensor), "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, and any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def has_shards(model: nn.Module) -> bool:
    """Return whether a rank holds a part of some parameter only."""
    return any(map(is_sharded, model.parameters()))


def allocate(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Allocate a model of the meta device on `device`, uninitialised; return the model.

    For a sharded model, only the local shards are allocated. Does the same as ``model.to_empty``,
    which imports sympy because it reads the strides of meta tensors. Raises ConfigError for a model
    that the device cannot hold.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    size = sum(local_part(tensor).nbytes for tensor in tensors)
    memory = device_memory(device)
    if memory is not None and size > memory:
        raise ConfigError(_too_large(size, device, f"{describe_bytes(memory)} in all"))

    def empty(tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            return torch.empty_like(tensor, device=device)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    try:
        return model._apply(empty)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(_too_large(size, device, "less than that free")) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an allocation failed, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )


def _too_large(size: int, device: torch.device | str, has: str) -> str:
    return (
        f"the model's tensors take {describe_bytes(size)} and {device} has {has}; make the model "
        "smaller, or shard it over more devices"
    )


def group_by_mesh(tensors: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    """Group tensors by device mesh; those that are not sharded form one group.

    torch's ``foreach`` operators raise on a list of tensors of several meshes.
    """
    groups: dict[object, list[AnyTensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if is_sharded(tensor) else None
        groups.setdefault(mesh, []).append(tensor)
    return list(groups.values())


def local_shard(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's shard and the index of its first element in the whole parameter."""
    if not is_sharded(parameter):
        return parameter, (0,) * parameter.dim()
    (chunk,) = parameter.__create_chunk_list__()  # the API that torch's checkpoints use
    return parameter.to_local(), tuple(chunk.offsets)
