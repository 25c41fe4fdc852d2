"""Exchanges on one rank: with a fault on rank 1, with host syncs counted, with rows counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard import Routing, Workload, default_registry
from tokenyard.permutations import TorchPermutation
from tokenyard_bench.exchange.sent import sent_bytes
from tokenyard_parallel._torch_private import end_all_to_all
from tokenyard_parallel.exchanges import ExchangeError, _counts

DIM = 8
FP8_DIM = 256
EXPERTS = 8
TOP_K = 2
TOKENS = 20


def make_exchange(name: str, chunks: int, validate: bool = False, fp8: bool = False) -> Any:
    dim = FP8_DIM if fp8 else DIM
    workload = Workload(dim, 12, EXPERTS, TOP_K, expert_parallel=dist.get_world_size())
    options: dict[str, Any] = {"name": name, "chunks": chunks, "validate": validate}
    options |= {"precision": "fp8"} if fp8 else {}
    chosen = default_registry().choose("exchange", options, workload)
    return chosen.construct(workload, TorchPermutation(workload), dist.group.WORLD)


def make_routing(
    tokens: int, width: int = DIM, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Routing]:
    torch.manual_seed(dist.get_rank())
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    weights = torch.rand(tokens, TOP_K, requires_grad=True)
    return x, Routing(ids, weights, torch.zeros(tokens, EXPERTS))


def compute(rows: Tensor, ids: Tensor, weights: Tensor, bound: int | None = None) -> Tensor:
    return (rows * weights.sum(1, keepdim=True)).to(rows.dtype)


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


def differs_in_precision(name: str) -> str:
    """Exchange in FP8 on rank 1 only; return the message of the error that this rank raises."""
    exchange = make_exchange(name, 1, validate=True, fp8=True)
    exchange.precision = "fp8" if dist.get_rank() == 1 else None
    try:
        exchange(*make_routing(TOKENS, FP8_DIM), compute)
    except ExchangeError as error:
        return str(error)
    return "no error"


class Traffic(NamedTuple):
    """What this rank sends to the other one, by direction, and what the exchange predicts."""

    sent: tuple[int, int]
    predicted: int
    digest: float  # of the output and the gradients


def traffic(name: str, chunks: int, dtype: torch.dtype) -> Traffic:
    """Exchange 2,000 tokens in FP8, and count the bytes that leave this rank."""
    exchange = make_exchange(name, chunks, fp8=True)
    x, routing = make_routing(2000, exchange.workload.dim, dtype)
    outcome: list[Tensor] = []

    def forward(_: Any) -> Tensor:
        y: Tensor = exchange(x, routing, compute)
        return y

    def backward(y: Tensor) -> None:
        y.backward(torch.ones_like(y) + x.detach())
        outcome.extend((y, x.grad, routing.topk_weights.grad))

    sent = sent_bytes((forward, backward), dist.get_rank())
    predicted = exchange.sent_bytes_per_token(dtype.itemsize) * 2000
    return Traffic(tuple(sent), predicted, sum(t.double().sum().item() for t in outcome))


def numbers_that_are_not_finite(name: str, number: float) -> list[list[list[int]]]:
    """Put a number at [3, 5] of x, then of the output's gradient, on rank 1.

    Return where the output is not finite on this rank, and where the gradient of x is not.
    """
    exchange = make_exchange(name, 2, fp8=True)
    places = []
    for where in ("x", "gradient"):
        x, routing = make_routing(TOKENS, FP8_DIM)
        dy = torch.randn(TOKENS, FP8_DIM)
        if dist.get_rank() == 1:
            (x.data if where == "x" else dy)[3, 5] = number
        y = exchange(x, routing, compute)
        y.backward(dy)
        result = y if where == "x" else x.grad
        places.append((~result.isfinite()).nonzero().tolist())
    return places


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
