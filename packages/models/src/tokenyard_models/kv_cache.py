"""Keys and values of the tokens already seen, for generating one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard import ConfigError
from tokenyard_models.config import TransformerConfig


class LayerCache:
    """One layer's keys and values [B, kv_heads, length, head_dim], in room reserved beforehand."""

    def __init__(self, batch: int, room: int, config: TransformerConfig):
        self.shape = (batch, config.kv_heads, room, config.head_dim)
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v [B, kv_heads, S, head_dim]; return all that is held. Raises ConfigError if they do not fit."""
        if k.shape[0] != self.shape[0]:
            raise ConfigError(
                f"the cache is for {self.shape[0]} sequences and {k.shape[0]} were given; make a new one"
            )
        start, end = self.length, self.length + k.shape[2]
        if end > self.shape[2]:
            raise ConfigError(
                f"the cache has room for {self.shape[2]} tokens and {end} were given; make a longer one"
            )
        if self._keys is None or self._values is None:
            self._keys, self._values = (
                torch.empty(self.shape, dtype=t.dtype, device=t.device) for t in (k, v)
            )
        self._keys[:, :, start:end], self._values[:, :, start:end] = k, v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Cache:
    """A LayerCache for each layer; pass it to the model with the tokens that follow those already in it."""

    def __init__(self, batch: int, room: int, config: TransformerConfig):
        self.layers = [LayerCache(batch, room, config) for _ in range(config.layers)]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length
