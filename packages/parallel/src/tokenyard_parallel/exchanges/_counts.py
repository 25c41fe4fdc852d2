"""Counts of the rows that travel between ranks: one exchange for all chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard import Routing
from tokenyard_parallel._torch_private import begin_all_to_all, end_all_to_all
from tokenyard_parallel.exchanges._transfer import ExchangeError


class ChunkCounts(NamedTuple):
    """Rows of a chunk to and from each rank of the group, and slots from all ranks."""

    sent: list[int]
    received: list[int]
    slots: int


def exchange_counts(sent: Tensor, group: Any, kept: Tensor | None = None) -> list[ChunkCounts]:
    """Exchange the counts of every chunk with all ranks of the group; return them by chunk.

    `sent` [ranks, chunks, 2] int32 holds this rank's rows and slots by destination rank. One host
    sync. With `kept`, the number of slots that the router kept, the counts of all ranks are
    compared first; raises ExchangeError on every rank if they disagree.
    """
    one_each = [1] * sent.shape[0]
    received = end_all_to_all(begin_all_to_all(sent, one_each, one_each, group))
    if kept is not None:
        _compare_counts(sent, received, kept, group)
    both = torch.stack((sent, received)).permute(0, 2, 3, 1)  # [2, chunks, 2, ranks]
    sent_by_chunk, received_by_chunk = both.tolist()
    return [
        ChunkCounts(sent_rows, received_rows, sum(received_slots))
        for (sent_rows, _), (received_rows, received_slots) in zip(sent_by_chunk, received_by_chunk)
    ]


_KIND = (
    "tokens of width",
    "experts a token:",
    "chunks:",
    "bytes a number:",
    "bytes a weight:",
    "bytes a sent token:",
)


def compare_kinds(group: Any, chunks: int, x: Tensor, routing: Routing, row_bytes: int) -> None:
    """Raise ExchangeError on every rank unless all ranks exchange the same kind of rows."""
    weights = routing.topk_weights
    width = x.shape[1]
    top_k = routing.topk_ids.shape[1]
    kind = [width, top_k, chunks, x.element_size(), weights.element_size(), row_bytes]
    first, *others = _all_gather(torch.tensor(kind, device=x.device), group).tolist()
    for rank, other in enumerate(others, 1):
        for name, expected, actual in zip(_KIND, first, other):
            if expected != actual:
                raise ExchangeError(
                    f"rank {rank} of the exchange's group has {name} {actual}, "
                    f"and rank 0 {expected}"
                )


def _compare_counts(sent: Tensor, received: Tensor, kept: Tensor, group: Any) -> None:
    """Raise ExchangeError unless the ranks' counts agree with each other and with `kept`."""
    counts = _all_gather(torch.stack((sent, received)), group)  # [ranks, 2, ranks, chunks, 2]
    sent_by_rank = counts[:, 0]  # [source, destination, chunks, 2]
    received_by_rank = counts[:, 1]  # [destination, source, chunks, 2]
    kept_slots = _all_gather(kept, group).tolist()
    sent_slots = sent_by_rank[..., 1].sum((1, 2)).tolist()
    for rank, (kept_here, sent_here) in enumerate(zip(kept_slots, sent_slots)):
        if kept_here != sent_here:
            raise ExchangeError(
                f"rank {rank} of the exchange's group sends {sent_here} slots, "
                f"but its router kept {kept_here}"
            )
    differs = (sent_by_rank.transpose(0, 1) != received_by_rank).flatten(2).any(2)
    for destination, source in differs.nonzero().tolist():
        raise ExchangeError(
            f"rank {source} of the exchange's group sends "
            f"{sent_by_rank[source, destination].tolist()} to rank {destination}, "
            f"which expects {received_by_rank[destination, source].tolist()}"
        )


def _all_gather(tensor: Tensor, group: Any) -> Tensor:
    """Return the tensor of every rank, stacked."""
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, tensor.contiguous(), group=group)
    return torch.stack(tensors)
