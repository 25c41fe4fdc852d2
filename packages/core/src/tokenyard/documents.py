"""Describe packed rows: several documents in a row of tokens, and padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard.interfaces import Documents


def pack_documents(ids: Tensor, count: int | None = None, longest: int | None = None) -> Documents:
    """Return the Documents of rows whose tokens have document `ids` [B, S]; PADDING for padding.

    A document is a run of equal ids in a row. With `count` and `longest`, which must be at least
    the number of runs and the length of the longest, shapes do not depend on the ids, as a CUDA
    graph needs. Without them, they are counted, which waits for the device of `ids`. Raises
    ValueError for too small a `count`.
    """
    rows, length = ids.shape
    first = torch.ones(rows, 1, dtype=torch.bool, device=ids.device)
    begins = torch.cat((first, ids[:, 1:] != ids[:, :-1]), 1)  # [B, S]
    places = torch.arange(length, device=ids.device).expand(rows, length)
    starts = places.where(begins, 0).cummax(1).values  # [B, S]
    offsets = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=ids.numel())
    if longest is None:
        longest = int(offsets.diff().max()) if ids.numel() else 0
    if count is not None:
        if count + 1 < offsets.numel():
            raise ValueError(f"count is {count}, and there are {offsets.numel() - 1} documents")
        offsets = F.pad(offsets, (0, count + 1 - offsets.numel()), value=ids.numel())
    return Documents(ids.int(), places - starts, offsets.int(), longest)
