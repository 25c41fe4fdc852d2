"""How many rows travel between which ranks: told once for all chunks, and compared if asked to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard import Routing
from tokenyard_parallel.exchanges._transfer import ExchangeError


class Counts(NamedTuple):
    """How many rows of a chunk go to each rank of the group and come from it, and slots that come from all."""

    sent: list[int]
    received: list[int]
    slots: int


def exchange_counts(sent: Tensor, group: Any, kept: Tensor | None = None) -> list[Counts]:
    """Tell every rank of the group how many rows and slots come to it; return the counts of each chunk.

    `sent` [ranks, chunks, 2] int32 are this rank's rows and slots by the rank that they go to. One copy to the host.
    With `kept`, the slots that the router kept, all ranks' counts are compared; raises ExchangeError on every one.
    """
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    if kept is not None:
        _compare_counts(sent, received, kept, group)
    there, here = (
        torch.stack((sent, received)).permute(0, 2, 3, 1).tolist()
    )  # [chunks][2][ranks] each
    return [Counts(own[0], others[0], sum(others[1])) for own, others in zip(there, here)]


def compare_kinds(group: Any, chunks: int, x: Tensor, routing: Routing) -> None:
    """Raise ExchangeError on every rank unless all of them are about to exchange the same kind of rows."""
    names = ("tokens of width", "experts a token:", "chunks:", "bytes a number:", "bytes a weight:")
    ids, weights = routing.topk_ids, routing.topk_weights
    own = [x.shape[1], ids.shape[1], chunks, x.element_size(), weights.element_size()]
    first, *rest = _gathered(torch.tensor(own, device=x.device), group).tolist()
    for rank, other in enumerate(rest, 1):
        for name, a, b in zip(names, first, other):
            if a != b:
                raise ExchangeError(
                    f"rank {rank} of the exchange's group has {name} {b}, and rank 0 {a}"
                )


def _compare_counts(sent: Tensor, received: Tensor, kept: Tensor, group: Any) -> None:
    """Raise ExchangeError unless every rank sends all slots that it kept, and each is told what the others send."""
    slots = _gathered(kept, group)
    everyone = _gathered(torch.stack((sent, received)), group)  # [ranks, 2, ranks, chunks, 2]
    goes, comes = everyone[:, 0], everyone[:, 1]
    for rank, (own, other) in enumerate(zip(slots.tolist(), goes[..., 1].sum((1, 2)).tolist())):
        if own != other:
            raise ExchangeError(
                f"rank {rank} of the exchange's group sends {other} slots, but its router kept {own}"
            )
    for rank, other in (goes.transpose(0, 1) != comes).flatten(2).any(2).nonzero().tolist():
        a, b = goes[other, rank].tolist(), comes[rank, other].tolist()
        raise ExchangeError(
            f"rank {other} of the exchange's group sends {a} to rank {rank}, which was told {b}"
        )


def _gathered(own: Tensor, group: Any) -> Tensor:
    """Return every rank's tensor, stacked."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts)
