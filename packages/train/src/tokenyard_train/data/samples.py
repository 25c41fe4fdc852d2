"""Training samples by global index, and held-out windows in order."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenyard import ConfigError
from tokenyard_train.data.shuffle import shuffled
from tokenyard_train.data.tokens import Ids, Tokens

IGNORED = -100
"""The target of a position that is not scored; ``F.cross_entropy`` skips it by default."""


class Samples:
    """Windows of `length` + 1 tokens of a stream, of which each predicts all but its first token.

    Sample i >= 0 is a pure function of i: epoch ``i // n`` shows each of the n windows once, in an order drawn from
    (seed, epoch), which is computed and not kept. So a run needs no cursor, resumes at no cost however much text there
    is, and sees the same samples on any number of processes.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int, shuffle: bool = True):
        self.tokens, self.length, self.seed, self.shuffle = tokens, length, seed, shuffle
        self.windows = (len(tokens) - 1) // length
        if self.windows < 1:
            raise ConfigError(
                f"the text has {len(tokens)} tokens; a sample of max_seq_len {length} needs {length + 1}"
            )

    def __len__(self) -> int:
        """Return the windows of an epoch."""
        return self.windows

    def __getitem__(self, index: int) -> Tensor:
        """Return sample `index` [length + 1] int64, for any index >= 0."""
        if index < 0:
            raise IndexError(f"samples are counted from 0 upwards, and {index} was asked for")
        epoch, place = divmod(index, self.windows)
        if self.shuffle:
            place = shuffled(place, self.windows, f"{self.seed}/{epoch}")
        start = place * self.length
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))

    def batch(
        self, step: int, size: int, rank: int = 0, world: int = 1, microbatch: int | None = None
    ) -> Tensor:
        """Return this rank's share [size / world, length + 1] of samples ``step * size ... (step + 1) * size``.

        Its microbatches follow each other; see `ranks_share`.
        """
        return torch.stack([self[i] for i in ranks_share(step, size, rank, world, microbatch)])


def ranks_share(
    step: int, size: int, rank: int, world: int, microbatch: int | None = None
) -> list[int]:
    """Return the samples of a step's batch that one of `world` ranks reads, one microbatch after the other.

    The first microbatches of all ranks are the first samples of the batch, and so on: what is computed together does
    not depend on how many ranks there are, if `microbatch` * world does not. Raises ConfigError for an uneven share.
    """
    if size % world:
        raise ConfigError(
            f"global_train_batch_size is {size}, which {world} data ranks cannot share evenly"
        )
    share = size // world
    each = microbatch or share
    firsts = (
        step * size + (at * world + rank * min(each, share - at)) for at in range(0, share, each)
    )
    return [
        first + i
        for at, first in zip(range(0, share, each), firsts)
        for i in range(min(each, share - at))
    ]


class HeldOut:
    """The windows of a held-out stream in order; together they predict every token but the first, once.

    With `batches`, only so many batches of windows, spread evenly over the stream, so that they are of many documents.
    """

    def __init__(self, tokens: Tokens, length: int, batch_size: int, batches: int = -1):
        windows = -(-(len(tokens) - 1) // length)
        if windows < 1:
            raise ConfigError(
                f"the held-out text has {len(tokens)} tokens; scoring needs 2 at least"
            )
        kept = windows if batches == -1 else min(windows, batches * batch_size)
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self._starts: NDArray[np.int64] = np.arange(kept) * windows // kept * length

    def __len__(self) -> int:
        """Return the batches."""
        return -(-len(self._starts) // self.batch_size)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [b, length] int64; past the end of the text, inputs are 0 and targets IGNORED."""
        first = index * self.batch_size
        rows = torch.stack(
            [self._window(int(start)) for start in self._starts[first : first + self.batch_size]]
        )
        return rows[:, :-1].clamp(min=0), rows[:, 1:]

    @property
    def predicted(self) -> Ids:
        """The tokens that are predicted, in order."""
        return np.concatenate([self.tokens[s + 1 : s + 1 + self.length] for s in self._starts])

    @property
    def previous(self) -> Ids:
        """The token before each one that is predicted."""
        last = len(self.tokens) - 1
        return np.concatenate([self.tokens[s : min(s + self.length, last)] for s in self._starts])

    def _window(self, start: int) -> Tensor:
        row = torch.full((self.length + 1,), IGNORED, dtype=torch.int64)
        tokens = self.tokens[start : start + self.length + 1]
        row[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        return row
