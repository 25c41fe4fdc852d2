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
        """Return the batch on a device. On a GPU it arrives after the work that is launched."""
        device = torch.device(device)
        documents = self.documents
        if documents is not None:
            documents = documents._replace(
                ids=_to(device, documents.ids),
                positions=_to(device, documents.positions),
                offsets=_to(device, documents.offsets),
            )
        return Batch(_to(device, self.ids), _to(device, self.targets), documents)

    def count_tokens(self) -> tuple[int, int]:
        """Return the number of tokens that are not padding, and of supervised tokens."""
        tokens = self.ids.numel()
        if self.documents is not None:
            tokens -= int(self.documents.padding.sum())
        return tokens, int((self.targets != IGNORED).sum())


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    # From other memory, the host would wait for all that the GPU does before the copy
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
