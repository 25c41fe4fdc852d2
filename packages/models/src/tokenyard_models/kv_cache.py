"""Cache keys and values of earlier tokens, to generate one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard import ConfigError
from tokenyard_models.config import TransformerConfig


class LayerCache:
    """The keys and values of one layer, [B, kv_heads, length, head_dim], in reserved memory.

    The memory is allocated on the first `append`, for `capacity` tokens.
    """

    def __init__(self, batch: int, capacity: int, config: TransformerConfig):
        self.shape = (batch, config.kv_heads, capacity, config.head_dim)
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, kv_heads, S, head_dim] and return all keys and values.

        Raises ConfigError if they do not fit.
        """
        if k.shape[0] != self.shape[0]:
            raise ConfigError(
                f"the cache is for {self.shape[0]} sequences and {k.shape[0]} were given; "
                "make a new one"
            )
        start = self.length
        end = start + k.shape[2]
        if end > self.shape[2]:
            raise ConfigError(
                f"the cache has room for {self.shape[2]} tokens and {end} were given; "
                "make a longer one"
            )
        if self._keys is None or self._values is None:
            self._keys = torch.empty(self.shape, dtype=k.dtype, device=k.device)
            self._values = torch.empty(self.shape, dtype=v.dtype, device=v.device)
        self._keys[:, :, start:end] = k
        self._values[:, :, start:end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def copy_to(self, other: LayerCache, length: int) -> None:
        """Append the first `length` keys and values to another cache."""
        if self._keys is not None and self._values is not None:
            other.append(self._keys[:, :, :length], self._values[:, :, :length])


class Cache:
    """A LayerCache for each layer.

    Pass it to the model with the tokens that follow those already in it.
    """

    def __init__(self, batch: int, capacity: int, config: TransformerConfig):
        self._config = config
        self.layers = [LayerCache(batch, capacity, config) for _ in range(config.layers)]

    @property
    def length(self) -> int:
        """Return the number of cached tokens."""
        return self.layers[0].length

    def prefix(self, length: int, capacity: int) -> Cache:
        """Return a cache with room for `capacity` tokens that holds the first `length` of these."""
        prefix = Cache(self.layers[0].shape[0], capacity, self._config)
        for layer, copy in zip(self.layers, prefix.layers):
            layer.copy_to(copy, length)
        return prefix
