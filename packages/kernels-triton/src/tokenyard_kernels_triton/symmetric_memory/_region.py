"""The layout of symmetric memory: a region of every rank's buffer, for one trip of rows."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes


class Sizes(NamedTuple):
    """The sizes of an exchange. They are equal on all ranks."""

    ranks: int  # n
    capacity: int  # C, most tokens of a rank
    dim: int  # D
    top_k: int  # K
    held: int  # E / n, the experts of a rank
    dtype: torch.dtype  # of rows
    weights_dtype: torch.dtype

    @property
    def received(self) -> int:
        """The rows that a rank receives, n * C: row ``s * C + t`` is token t of rank s."""
        return self.ranks * self.capacity


class Layout(NamedTuple):
    """Byte offsets in a region, and its bytes."""

    rows: int  # [n * C, D]
    weights: int  # [n * C, K]
    ids: int  # [C, K] int32
    tokens: int  # [1] int32
    bytes: int


@lru_cache(maxsize=64)
def layout_of(sizes: Sizes) -> Layout:
    """Return the layout of a region."""
    parts = (
        sizes.received * sizes.dim * sizes.dtype.itemsize,
        sizes.received * sizes.top_k * sizes.weights_dtype.itemsize,
        sizes.capacity * sizes.top_k * torch.int32.itemsize,
        torch.int32.itemsize,
    )
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + -(-part // _ALIGNMENT) * _ALIGNMENT)
    return Layout(*ends)


class Region(NamedTuple):
    """The same part of every rank's buffer. Each rank writes to its own and reads all of them."""

    key: int  # that no other region of this process has
    sizes: Sizes
    rank: int
    start: int  # bytes
    buffers: tuple[Tensor, ...]  # [n] uint8, the buffer of each rank
    addresses: Tensor  # [n] int64, where they begin

    def rows(self, rank: int) -> Tensor:
        """Return the rows [n * C, D] of a rank. Tokens that are sent are the first C of them."""
        sizes = self.sizes
        return self._part(
            rank, layout_of(self.sizes).rows, (sizes.received, sizes.dim), sizes.dtype
        )

    def weights(self, rank: int) -> Tensor:
        """Return the weights, or their gradients, [n * C, K] of a rank."""
        sizes = self.sizes
        shape = (sizes.received, sizes.top_k)
        return self._part(rank, layout_of(self.sizes).weights, shape, sizes.weights_dtype)

    def ids(self, rank: int) -> Tensor:
        """Return the expert ids [C, K] of a rank's tokens."""
        shape = (self.sizes.capacity, self.sizes.top_k)
        return self._part(rank, layout_of(self.sizes).ids, shape, torch.int32)

    def tokens(self, rank: int) -> Tensor:
        """Return the number of tokens [1] of a rank."""
        return self._part(rank, layout_of(self.sizes).tokens, (1,), torch.int32)

    def _part(self, rank: int, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        begin = self.start + at
        part = self.buffers[rank][begin : begin + prod(shape) * dtype.itemsize]
        return part.view(dtype).view(shape)
