"""A cache of keys and values for calls that a CUDA graph captures: one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenyard_models.config import TransformerConfig
from tokenyard_models.rotary import Rotation, rotation_of


class FixedCache:
    """A cache that takes one token a call, at a position that is on the device.

    Every call launches the same kernels on the same memory. Call `advance` after each. The caller
    counts the tokens: one past the capacity is an error of the device.
    """

    def __init__(self, memory: Sequence[tuple[Tensor, Tensor]], config: TransformerConfig):
        """`memory` has the reserved keys and values of each layer."""
        self._position = FixedPosition(memory[0][0], config)
        self.layers = [FixedLayerCache(*layer, self._position) for layer in memory]

    @property
    def position(self) -> Tensor:
        """Return the position [1] of the next token."""
        return self._position.index

    @property
    def rotation(self) -> Rotation | None:
        """Return the rotation of the next token; None without rotary positions."""
        return self._position.rotation

    def advance(self) -> None:
        """Move to the next position."""
        self._position.index += 1
        self._position.describe()

    def move_to(self, position: int) -> None:
        """Move to a position."""
        self._position.index.fill_(position)
        self._position.describe()


class FixedPosition:
    """The position of a `FixedCache`, and what every layer reads of it."""

    def __init__(self, keys: Tensor, config: TransformerConfig):
        self._config = config
        self._reserved = torch.arange(keys.shape[2], device=keys.device)
        self.index = torch.zeros_like(self._reserved[:1])
        self.mask = keys.new_zeros(keys.shape[2])  # 0, or -inf after the position
        self.rotation = rotation_of(self.index, config, keys.dtype)

    def describe(self) -> None:
        """Write the mask and the rotation."""
        self.mask.zero_().masked_fill_(self._reserved > self.index, float("-inf"))
        new = rotation_of(self.index, self._config, self.mask.dtype)
        for memory, tensor in zip(self.rotation or (), new or ()):
            memory.copy_(tensor)


class FixedLayerCache:
    """The keys and values of one layer of a `FixedCache`."""

    def __init__(self, keys: Tensor, values: Tensor, position: FixedPosition):
        self._keys = keys
        self._values = values
        self.position = position

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, kv_heads, 1, head_dim] at the position. Return the whole memory."""
        self._keys.index_copy_(2, self.position.index, k)
        self._values.index_copy_(2, self.position.index, v)
        return self._keys, self._values
