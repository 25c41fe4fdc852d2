"""Mix several streams of samples by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenyard import ConfigError
from tokenyard_train.data.batch import Batch, window_batch
from tokenyard_train.data.samples import Samples, sample_indices

BLOCK = 4096
"""Samples per block. Within a block, each stream gives exactly its share."""


class Mixture:
    """Samples of several streams, interleaved by weight.

    Each block of BLOCK samples takes a fixed number from each stream: its share of the weights, by
    largest remainders. The order within a block is drawn from (seed, block). So sample i is a pure
    function of i and needs no cursor. Each stream advances through its epochs independently.
    Raises ConfigError if a stream's weight is below one sample per block.
    """

    def __init__(self, streams: Mapping[str, Samples], weights: Mapping[str, float], seed: int):
        self.streams = dict(streams)
        self.seed = seed
        self.length = next(iter(self.streams.values())).length
        self.shares = block_shares({name: weights[name] for name in self.streams})
        self._block = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Return the samples after which every stream has completed at least one epoch."""
        return max(-(-len(s) * BLOCK // self.shares[name]) for name, s in self.streams.items())

    def __getitem__(self, index: int) -> Tensor:
        """Return sample `index` [length + 1] int64, for any index >= 0."""
        name, stream_index = self.locate(index)
        return self.streams[name][stream_index]

    def describe(self) -> str:
        """Return the number of tokens, of samples, and of tokens after the last whole windows."""
        tokens = sum(len(stream.tokens) for stream in self.streams.values())
        unused = sum(stream.unused for stream in self.streams.values())
        rest = f", {unused:,} tokens at the ends unused" if unused else ""
        return f"{tokens:,} tokens, {len(self):,} samples of {self.length}{rest}"

    def batch(
        self, step: int, size: int, rank: int = 0, world: int = 1, microbatch: int | None = None
    ) -> Tensor:
        """Return one rank's samples of a step's batch [size / world, length + 1] int64.

        The batch is samples ``step * size`` to ``(step + 1) * size - 1``; see `sample_indices`.
        """
        return torch.stack([self[i] for i in sample_indices(step, size, rank, world, microbatch)])

    def microbatches(self, step: int, size: int, rank: int, world: int, rows: int) -> list[Batch]:
        """Return what `batch` returns, in microbatches of `rows` samples."""
        windows = self.batch(step, size, rank, world, rows)
        return [window_batch(part) for part in windows.split(rows)]

    def locate(self, index: int) -> tuple[str, int]:
        """Return the stream of sample `index`, and the sample's index in that stream."""
        block, position = divmod(index, BLOCK)
        order = self._block_order(block)
        stream = int(order[position])
        name = list(self.streams)[stream]
        earlier = int((order[:position] == stream).sum())
        return name, block * self.shares[name] + earlier

    def _block_order(self, block: int) -> NDArray[np.int64]:
        """Return the stream number of each sample of a block [BLOCK]; the last block is cached."""
        if block != self._block:
            streams = np.repeat(np.arange(len(self.shares)), list(self.shares.values()))
            generator = np.random.Generator(np.random.Philox(key=[self.seed, block]))
            self._order = generator.permutation(streams)
            self._block = block
        return self._order


def block_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Return each stream's samples per block, by largest remainders. Raises ConfigError for 0."""
    total = sum(weights.values())
    exact = {name: BLOCK * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder: Sequence[str] = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: BLOCK - sum(shares.values())]:
        shares[name] += 1
    for name, share in shares.items():
        if share == 0:
            raise ConfigError(
                f"streams.{name}.proportion is {weights[name]}, less than one sample in {BLOCK}; "
                "raise it, or leave the stream out"
            )
    return shares
