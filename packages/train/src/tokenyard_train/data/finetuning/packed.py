"""Documents packed into rows: training samples by global index, and held-out rows in order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tokenyard import IGNORED, PADDING, pack_documents
from tokenyard_train.data.batch import Batch
from tokenyard_train.data.finetuning.first_fit import first_fit
from tokenyard_train.data.samples import sample_indices
from tokenyard_train.data.shuffle import permute_index
from tokenyard_train.data.tokens import Ids


class TokenizedDocuments(NamedTuple):
    """The tokens of all documents, one after another."""

    ids: Ids  # [tokens]
    targets: NDArray[np.bool_]  # [tokens]: whether a token is supervised
    ends: NDArray[np.int64]  # [documents]: the position after each one's last token

    def identity(self) -> str:
        """Return a digest of the content."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        digest.update(np.packbits(self.targets).data)
        digest.update(self.ends.astype("<i8").data)
        return digest.hexdigest()


class PackedDocuments:
    """Rows of `length` tokens that hold whole documents, packed by first fit.

    A document of n tokens takes n - 1 of a row: its last token is only predicted. Packing depends
    on the documents, the length and the seed alone, and each epoch shows every row once, in an
    order that is computed from (seed, epoch). So sample i is a pure function of i, and a run needs
    no cursor. Without `shuffle`, documents and rows stay in order. If not `packed`, each document
    has a row of its own.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        length: int,
        seed: int,
        shuffle: bool = True,
        packed: bool = True,
    ):
        self.documents = documents
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        count = len(documents.ends)
        self._starts = np.concatenate(([0], documents.ends[:-1]))
        self._sizes = documents.ends - self._starts - 1  # [documents] tokens in a row
        order = np.arange(count)
        if shuffle:
            order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(count)
        # [documents], in packing order
        rows = first_fit(self._sizes[order].tolist(), length) if packed else np.arange(count)
        self._packed = order[np.argsort(rows, kind="stable")]  # documents, row by row
        per_row = np.bincount(rows)
        self._row_ends = np.cumsum(per_row)
        used = np.bincount(rows, weights=self._sizes[order]).astype(np.int64)
        padding = length - used
        self._parts = int((per_row + (padding > 0)).max())  # of a row: documents and padding
        self._longest = int(max(self._sizes.max(), padding.max()))

    def __len__(self) -> int:
        """Return the number of rows, which is the samples of an epoch."""
        return len(self._row_ends)

    @property
    def tokens(self) -> int:
        """Return the tokens of an epoch, without padding."""
        return int(self._sizes.sum())

    @property
    def supervised(self) -> int:
        """Return the supervised tokens of an epoch."""
        return int(self.documents.targets.sum())

    def describe(self) -> str:
        """Return the number of documents and tokens, and how full the rows are."""
        return (
            f"{len(self.documents.ends):,} documents, {self.tokens:,} tokens, of which "
            f"{self.supervised:,} supervised, in {len(self):,} rows of {self.length}, "
            f"{self.tokens / (len(self) * self.length):.1%} full"
        )

    def microbatches(self, step: int, size: int, rank: int, world: int, rows: int) -> list[Batch]:
        """Return one rank's samples of a step's batch, in microbatches of `rows` samples."""
        indices = sample_indices(step, size, rank, world, rows)
        chosen = [self._row(index) for index in indices]
        return [self.batch(chosen[start : start + rows]) for start in range(0, len(chosen), rows)]

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return some rows. Its shapes depend on their number alone."""
        shape = (len(rows), self.length)
        ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        numbers = np.full(shape, PADDING, dtype=np.int64)
        for i, row in enumerate(rows):
            first = int(self._row_ends[row - 1]) if row else 0
            start = 0
            for number, document in enumerate(self._packed[first : self._row_ends[row]]):
                end = start + int(self._sizes[document])
                span = slice(self._starts[document], self.documents.ends[document])
                tokens = self.documents.ids[span].astype(np.int64)
                ids[i, start:end] = tokens[:-1]
                targets[i, start:end] = np.where(self.documents.targets[span], tokens, IGNORED)[1:]
                numbers[i, start:end] = number
                start = end
        documents = pack_documents(
            torch.from_numpy(numbers), len(rows) * self._parts, self._longest
        )
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), documents)

    def identity(self) -> str:
        """Return a digest of the ids, the supervised tokens and the document ends."""
        return self.documents.identity()

    def _row(self, index: int) -> int:
        epoch, row = divmod(index, len(self))
        return permute_index(row, len(self), f"{self.seed}/{epoch}") if self.shuffle else row


class PackedHeldOut:
    """Rows of packed documents in order. `batches` limits them; they are then evenly spaced."""

    def __init__(self, packed: PackedDocuments, batch_size: int, batches: int = -1):
        rows = len(packed)
        kept = rows if batches == -1 else min(rows, batches * batch_size)
        self._batch_size = batch_size
        self._packed = packed
        self._rows: list[int] = (np.arange(kept) * rows // kept).tolist()
        parts = [packed.batch([row]) for row in self._rows]
        scored = [part.targets != IGNORED for part in parts]
        self.predicted: Ids = _select([part.targets for part in parts], scored)
        """The predicted tokens, in order [tokens]."""
        self.previous: Ids = _select([part.ids for part in parts], scored)
        """The token before each predicted token [tokens]."""

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._rows) // self._batch_size)

    def batch(self, index: int) -> Batch:
        """Return the rows of a batch."""
        first = index * self._batch_size
        return self._packed.batch(self._rows[first : first + self._batch_size])


def _select(rows: list[torch.Tensor], scored: list[torch.Tensor]) -> Ids:
    kept: Ids = torch.cat([row[here] for row, here in zip(rows, scored)]).numpy()
    return kept
