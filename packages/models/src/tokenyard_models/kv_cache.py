"""Cache keys and values of earlier tokens, to generate one token at a time."""

from __future__ import annotations

from torch import Tensor

from tokenyard import ConfigError
from tokenyard_models.config import TransformerConfig
from tokenyard_models.fixed_cache import FixedCache

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

    def rewind(self, length: int) -> None:
        """Keep the first `length` keys and values, and write zeros over the others."""
        self.length = length
        for memory in (self._keys, self._values):
            if memory is not None:
                memory[:, :, length:].zero_()

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
        self._fixed: FixedCache | None = None
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

    def rewind(self, length: int) -> None:
        """Drop all tokens but the first `length`. The memory stays where it is.

        Raises ConfigError for more tokens than the cache may hold.
        """
        # The position of a fixed cache is on the device.
        most = self.length if self._fixed is None else self.layers[0].shape[2]
        if not 0 <= length <= most:
            raise ConfigError(
                f"length is {length}, and the cache holds at most {most} tokens; give a number "
                f"from 0 to {most}"
            )
        for layer in self.layers:
            layer.rewind(length)

    def fixed(self) -> FixedCache:
        """Return these keys and values as a cache whose calls can be captured in a CUDA graph.

        It is the same one each time, and moves to the end of this cache.
        """
        if self._fixed is None:
            memory = [layer.memory() for layer in self.layers]
            self._fixed = FixedCache(memory, self._config)
        self._fixed.move_to(self.length)
        return self._fixed
