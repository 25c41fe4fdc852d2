"""Cut a token stream into training samples by global index, and into held-out windows in order."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenyard import IGNORED, ConfigError
from tokenyard_train.data.batch import Batch, window_batch
from tokenyard_train.data.shuffle import permute_index
from tokenyard_train.data.tokens import Ids, Tokens


class Samples:
    """Windows of `length` + 1 tokens; each predicts all of its tokens but the first.

    Sample i >= 0 is a pure function of i. Epoch ``i // n`` shows each of the n windows once, in an
    order that is computed from (seed, epoch) and never stored. So a run needs no cursor, resumes at
    constant cost, and sees the same samples on any number of ranks. Raises ConfigError if the text
    is shorter than one window.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int, shuffle: bool = True):
        self.tokens = tokens
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.windows = (len(tokens) - 1) // length
        if self.windows < 1:
            raise ConfigError(
                f"the text has {len(tokens)} tokens; "
                f"a sample of max_seq_len {length} needs {length + 1}; give more text, or shorter "
                "samples"
            )

    def __len__(self) -> int:
        """Return the number of windows in an epoch."""
        return self.windows

    def __getitem__(self, index: int) -> Tensor:
        """Return sample `index` [length + 1] int64, for any index >= 0."""
        if index < 0:
            raise IndexError(f"sample indices start at 0, and {index} was given")
        epoch, window = divmod(index, self.windows)
        if self.shuffle:
            window = permute_index(window, self.windows, f"{self.seed}/{epoch}")
        start = window * self.length
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))

    def describe(self) -> str:
        """Return the number of tokens, of samples, and of tokens after the last whole window."""
        unused = self.unused
        rest = f", last {unused:,} tokens unused" if unused else ""
        return f"{len(self.tokens):,} tokens, {len(self):,} samples of {self.length}{rest}"

    @property
    def unused(self) -> int:
        """The tokens after the last whole window, which are never trained on."""
        return len(self.tokens) - 1 - self.windows * self.length

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


def sample_indices(
    step: int, size: int, rank: int, world: int, microbatch: int | None = None
) -> list[int]:
    """Return the sample indices [size / world] that one rank reads in a step, by microbatch.

    The first microbatches of all ranks cover the first samples of the batch, and so on. So the
    samples that are computed together depend only on `microbatch` * world. Raises ConfigError if
    `size` is not a multiple of `world`.
    """
    if size % world:
        raise ConfigError(
            f"global_train_batch_size is {size}, which {world} data ranks cannot share evenly"
        )
    share = size // world
    indices: list[int] = []
    for start in range(0, share, microbatch or share):
        count = min(microbatch or share, share - start)
        first = step * size + start * world + rank * count
        indices += range(first, first + count)
    return indices


class HeldOut:
    """Windows of a held-out stream in order. Together they predict every token but the first once.

    `batches` limits the number of batches. Their windows are then evenly spaced over the stream, so
    that they cover many documents. Raises ConfigError if the text has fewer than two tokens.
    """

    def __init__(self, tokens: Tokens, length: int, batch_size: int, batches: int = -1):
        windows = -(-(len(tokens) - 1) // length)
        if windows < 1:
            raise ConfigError(
                f"the held-out text has {len(tokens)} tokens; scoring needs 2 at least"
            )
        kept = windows if batches == -1 else min(windows, batches * batch_size)
        self.tokens = tokens
        self.length = length
        self.batch_size = batch_size
        self._starts: NDArray[np.int64] = np.arange(kept) * windows // kept * length

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._starts) // self.batch_size)

    def batch(self, index: int) -> Batch:
        """Return the rows of a batch [b, length].

        Past the end of the text, ids are 0 and targets are IGNORED.
        """
        first = index * self.batch_size
        rows = torch.stack(
            [self._window(int(start)) for start in self._starts[first : first + self.batch_size]]
        )
        return Batch(rows[:, :-1].clamp(min=0), rows[:, 1:])

    @property
    def predicted(self) -> Ids:
        """The predicted tokens, in order [tokens]."""
        return np.concatenate([self.tokens[s + 1 : s + 1 + self.length] for s in self._starts])

    @property
    def previous(self) -> Ids:
        """The token before each predicted token [tokens]."""
        last = len(self.tokens) - 1
        return np.concatenate([self.tokens[s : min(s + self.length, last)] for s in self._starts])

    def _window(self, start: int) -> Tensor:
        row = torch.full((self.length + 1,), IGNORED, dtype=torch.int64)
        tokens = self.tokens[start : start + self.length + 1]
        row[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        return row
