"""The tokens of a forward pass: ids, targets, and the documents of packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tokenyard import IGNORED, Documents


class Batch(NamedTuple):
    """Rows of tokens that a model reads, and the tokens that it should predict."""

    ids: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64; IGNORED is not supervised
    documents: Documents | None = None  # None: each row is one text without padding

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device. The host does not wait for a GPU, see `to_device`."""
        device = torch.device(device)
        documents = self.documents
        if documents is not None:
            documents = documents._replace(
                ids=to_device(documents.ids, device),
                positions=to_device(documents.positions, device),
                offsets=to_device(documents.offsets, device),
            )
        return Batch(to_device(self.ids, device), to_device(self.targets, device), documents)

    def count_tokens(self) -> tuple[int, int]:
        """Return the number of tokens that are not padding, and of supervised tokens."""
        tokens = self.ids.numel()
        if self.documents is not None:
            tokens -= int(self.documents.padding.sum())
        return tokens, int((self.targets != IGNORED).sum())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. The copy to a GPU is queued on the current stream."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # For memory that is not pinned, the host would wait for all work in the queue
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def window_batch(windows: Tensor) -> Batch:
    """Return the Batch of windows [B, S + 1], in which each token predicts the next."""
    return Batch(windows[:, :-1], windows[:, 1:])


class TrainingData(Protocol):
    """What a training run reads. Sample i is a pure function of i."""

    length: int  # S, tokens per row

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        ...

    def microbatches(
        self, step: int, size: int, rank: int, world: int, rows: int
    ) -> Sequence[Batch]:
        """Return one rank's samples of a step's batch, in microbatches of `rows` samples."""
        ...
