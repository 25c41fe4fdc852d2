"""Exchanges on one rank: with a fault on rank 1, with host syncs counted, with rows counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard import Routing, Workload, default_registry
from tokenyard.permutations import TorchPermutation
from tokenyard_parallel._torch_private import end_all_to_all
from tokenyard_parallel.exchanges import ExchangeError, _counts

DIM = 8
EXPERTS = 8
TOP_K = 2
TOKENS = 20


def make_exchange(name: str, chunks: int, validate: bool = False) -> Any:
    workload = Workload(DIM, 12, EXPERTS, TOP_K, expert_parallel=dist.get_world_size())
    options = {"name": name, "chunks": chunks, "validate": validate}
    chosen = default_registry().choose("exchange", options, workload)
    return chosen.construct(workload, TorchPermutation(workload), dist.group.WORLD)


def make_routing(tokens: int, width: int = DIM) -> tuple[Tensor, Routing]:
    torch.manual_seed(dist.get_rank())
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    x = torch.randn(tokens, width, requires_grad=True)
    weights = torch.rand(tokens, TOP_K, requires_grad=True)
    return x, Routing(ids, weights, torch.zeros(tokens, EXPERTS))


def compute(rows: Tensor, ids: Tensor, weights: Tensor, bound: int | None = None) -> Tensor:
    return rows * weights.sum(1, keepdim=True)


def error_with_fault(name: str, chunks: int, fault: str) -> str:
    """Exchange with a fault on rank 1; return the message of the error that this rank raises."""
    if dist.get_rank() != 1:
        fault = ""
    exchange = make_exchange(name, chunks + (fault == "chunks"), validate=True)
    x, routing = make_routing(TOKENS, 6 if fault == "width" else DIM)
    if fault == "slots":
        exchange.row_format.sort = with_extra_slot(exchange.row_format.sort)
    try:
        with wrong_received_counts() if fault == "received" else nullcontext():
            exchange(x, routing, compute)
    except ExchangeError as error:
        return str(error)
    return "no error"


def with_extra_slot(sort: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Return a `sort` that counts a slot too many in its first call."""
    extra = iter([torch.tensor([1, 0], dtype=torch.int32)])

    def wrong(topk_ids: Tensor) -> Any:
        order = sort(topk_ids)
        return order._replace(slots=order.slots + next(extra, 0))

    return wrong


def wrong_received_counts() -> AbstractContextManager[Any]:
    """Context: add 1 to every count that this rank receives."""
    return patch.object(_counts, "end_all_to_all", lambda counts: end_all_to_all(counts) + 1)


class HostReads(TorchDispatchMode):
    """Counts the operators that would synchronise the host with a GPU, and `Tensor.tolist`."""

    SYNCING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function in self.SYNCING
        return function(*args, **(kwargs or {}))


def host_syncs(name: str, chunks: int) -> tuple[int, int]:
    """Return how often the host reads a tensor, in the forward and in the backward pass."""
    exchange = make_exchange(name, chunks)
    x, routing = make_routing(TOKENS)
    tolist = torch.Tensor.tolist
    reads = HostReads()

    def counted(tensor: Tensor) -> Any:
        reads.count += 1
        return tolist(tensor)

    with reads, patch.object(torch.Tensor, "tolist", counted):
        y = exchange(x, routing, compute)
        forward = reads.count
        y.sum().backward()
    return forward, reads.count - forward


def rows_per_token(name: str) -> tuple[float, float]:
    """Return the predicted and the actual number of received rows per token."""
    exchange = make_exchange(name, chunks=1)
    x, routing = make_routing(2000)
    rows_received = []

    def counting(rows: Tensor, *rest: Any) -> Tensor:
        rows_received.append(len(rows))
        return compute(rows, *rest)

    exchange(x, routing, counting)
    return exchange.rows_per_token, rows_received[0] / 2000
