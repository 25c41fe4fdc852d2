"""The microbatches of a step on the device, read while the GPU computes the step before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import Strategy
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data
from tokenyard_train.data.batch import Batch, to_device

Count = Tensor | int
"""A number of tokens. It is a tensor if it is known after a reduction over ranks only."""


class Counts(NamedTuple):
    """Tokens over all ranks. Padding is not counted."""

    microbatch: Count
    batch: Count
    supervised: Count  # of the batch; at least 1


class Work(NamedTuple):
    """What a forward and backward pass reads. It is a pytree of tensors and ints."""

    batch: Batch
    counts: Counts


class Reader:
    """Reads this rank's share of each batch."""

    def __init__(self, config: TrainConfig, data: Data, strategy: Strategy):
        self.config = config
        self.data = data
        self.strategy = strategy
        self._ahead: tuple[int, list[Work]] | None = None

    def read_ahead(self, batch: int) -> None:
        """Read the batch that `take` returns next. All ranks call it: counting takes a sum."""
        self._ahead = (batch, self._read(batch))

    def take(self, batch: int) -> list[Work]:
        """Return this rank's microbatches of a batch."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == batch else self._read(batch)

    def _read(self, batch: int) -> list[Work]:
        config = self.config
        rank, world = self.strategy.data
        rows_each = int(config.device_train_microbatch_size)
        parts = self.data.train.microbatches(
            batch, config.global_train_batch_size, rank, world, rows_each
        )
        counts = self._count_tokens(parts)
        device = torch.device(config.device)
        return [Work(part.to(device), each) for part, each in zip(parts, counts, strict=True)]

    def _count_tokens(self, parts: Sequence[Batch]) -> list[Counts]:
        """Return the counts of each microbatch over all ranks.

        Counts of packed documents take one reduction for the whole batch. Those of text are known.
        """
        if all(part.documents is None for part in parts):
            world = self.strategy.data[1]
            total = self.config.global_train_batch_size * self.config.max_seq_len
            return [Counts(part.ids.numel() * world, total, total) for part in parts]
        own = torch.tensor(
            [part.count_tokens() for part in parts], dtype=torch.float64
        )  # [microbatches, 2]
        sent = to_device(own, torch.device(self.config.device))
        tokens, supervised = self.strategy.reduce(sent).unbind(1)
        # A batch without supervised tokens has the loss 0, and the gradient of the router losses.
        return [Counts(each, tokens.sum(), supervised.sum().clamp(min=1)) for each in tokens]
