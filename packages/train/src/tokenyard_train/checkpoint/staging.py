"""Copies of tensors in the host's memory, to be written while training changes the tensors themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenyard.sharded import is_sharded


class Staged(Tensor):
    """This rank's copy of its shard of a tensor; torch's checkpoints ask it what they ask a sharded tensor."""

    _items: list[Any]

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        """Return what is to be written: the shard, and where it lies in the whole."""
        return self._items

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """Return the shard as a plain tensor."""
        return self.as_subclass(Tensor)


def stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into the host's memory, of sharded ones this rank's shards."""
    return {name: _staged(name, tensor) for name, tensor in tensors.items()}


def _staged(name: str, tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return tensor.detach().to("cpu", copy=True)
    copy = tensor.to_local().detach().to("cpu", copy=True).as_subclass(Staged)
    copy._items = tensor.__create_write_items__(name, tensor)
    return copy
