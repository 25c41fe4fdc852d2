"""Several streams of samples as one, by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenyard import ConfigError
from tokenyard_train.data.samples import Samples, ranks_share

BLOCK = 4096
"""Samples after which every stream has had exactly its share."""


class Mixture:
    """Samples of several streams, interleaved by weight; each stream goes through its epochs at its own pace.

    Of every BLOCK samples each stream gives a fixed number (its weight's share, by largest remainders), in an order
    drawn from (seed, block). So sample i is a pure function of i, and any place is found without what came before.
    Raises ConfigError for a stream whose weight is too small to give one sample in a block.
    """

    def __init__(self, streams: Mapping[str, Samples], weights: Mapping[str, float], seed: int):
        self.streams, self.seed = dict(streams), seed
        self.length = next(iter(self.streams.values())).length
        self.shares = block_shares({name: weights[name] for name in self.streams})
        self._block, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Return after how many samples the stream that lasts longest, by its share, has been seen whole."""
        return max(-(-len(s) * BLOCK // self.shares[name]) for name, s in self.streams.items())

    def __getitem__(self, index: int) -> Tensor:
        """Return sample `index` [length + 1] int64, for any index >= 0."""
        name, place = self.locate(index)
        return self.streams[name][place]

    def batch(
        self, step: int, size: int, rank: int = 0, world: int = 1, microbatch: int | None = None
    ) -> Tensor:
        """Return this rank's share [size / world, length + 1] of samples ``step * size ... (step + 1) * size``."""
        return torch.stack([self[i] for i in ranks_share(step, size, rank, world, microbatch)])

    def locate(self, index: int) -> tuple[str, int]:
        """Return the stream of sample `index`, and its number in that stream."""
        block, place = divmod(index, BLOCK)
        order = self._order_of(block)
        chosen = int(order[place])
        name = list(self.streams)[chosen]
        return name, block * self.shares[name] + int((order[:place] == chosen).sum())

    def _order_of(self, block: int) -> NDArray[np.int64]:
        if block != self._block:
            each = np.repeat(np.arange(len(self.shares)), list(self.shares.values()))
            generator = np.random.Generator(np.random.Philox(key=[self.seed, block]))
            self._block, self._order = block, generator.permutation(each)
        return self._order


def block_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Return how many of BLOCK samples each stream gives, by largest remainders. Raises ConfigError for none."""
    whole = sum(weights.values())
    exact = {name: BLOCK * weight / whole for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder: Sequence[str] = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: BLOCK - sum(shares.values())]:
        shares[name] += 1
    for name, share in shares.items():
        if share == 0:
            raise ConfigError(
                f"streams.{name}.proportion is {weights[name]}, less than one sample in {BLOCK}; raise it, or leave "
                f"the stream out"
            )
    return shares
