"""Cache keys and values of earlier tokens, to generate one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard import ConfigError
from tokenyard_models.config import TransformerConfig
from tokenyard_models.rotary import rotation_angles

_ALIGNED = 64  # tokens, of which reserved memory holds a multiple


class LayerCache:
    """The keys and values of one layer, [B, kv_heads, length, head_dim], in reserved memory.

    The memory is allocated on the first `append`, for `capacity` tokens. It starts as zeros: a
    `FixedCache` attends to all of it, with a weight of 0 for tokens that are not there.
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
            batch, heads, capacity, head_dim = self.shape
            shape = (batch, heads, -(-capacity // _ALIGNED) * _ALIGNED, head_dim)
            self._keys = k.new_zeros(shape)
            self._values = v.new_zeros(shape)
        self._keys[:, :, start:end] = k
        self._values[:, :, start:end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def memory(self) -> tuple[Tensor, Tensor]:
        """Return all reserved keys and values. Raises ConfigError before the first `append`."""
        if self._keys is None or self._values is None:
            raise ConfigError("the cache is empty; call the model with a prompt first")
        return self._keys, self._values

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

    def fixed(self) -> FixedCache:
        """Return these keys and values as a cache whose calls can be captured in a CUDA graph."""
        return FixedCache(self, self._config)


class FixedCache:
    """A cache that takes one token a call, at a position that is on the device.

    Every call launches the same kernels on the same memory. Call `advance` after each. The caller
    counts the tokens: one past the capacity is an error of the device.
    """

    def __init__(self, cache: Cache, config: TransformerConfig):
        keys, _ = cache.layers[0].memory()
        self._config = config
        self._reserved = torch.arange(keys.shape[2], device=keys.device)
        wide = torch.promote_types(keys.dtype, torch.float32)
        self.position = torch.tensor([cache.length], device=keys.device)
        self.mask = keys.new_zeros(keys.shape[2])  # 0, or -inf after the position
        self.cos = keys.new_zeros(1, config.head_dim, dtype=wide)
        self.sin = torch.zeros_like(self.cos)
        self._describe_position()
        self.layers = [FixedLayerCache(layer, self) for layer in cache.layers]

    def advance(self) -> None:
        """Move to the next position."""
        self.position += 1
        self._describe_position()

    def _describe_position(self) -> None:
        """Write what every layer reads of the position: the mask, and how ``rotate_by`` rotates."""
        self.mask.zero_().masked_fill_(self._reserved > self.position, float("-inf"))
        theta = self._config.rope_theta
        if theta is not None:
            size, dtype = self._config.head_dim, self.cos.dtype
            angles = rotation_angles(self.position, size, dtype, theta, self._config.rope_scaling)
            self.cos.copy_(angles.cos().repeat(1, 2))
            self.sin.copy_(torch.cat((-angles.sin(), angles.sin()), 1))


class FixedLayerCache:
    """The keys and values of one layer of a `FixedCache`."""

    def __init__(self, layer: LayerCache, cache: FixedCache):
        self._keys, self._values = layer.memory()
        self.cache = cache

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, kv_heads, 1, head_dim] at the position. Return the whole memory."""
        self._keys.index_copy_(2, self.cache.position, k)
        self._values.index_copy_(2, self.cache.position, v)
        return self._keys, self._values
