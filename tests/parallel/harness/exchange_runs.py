"""What one rank does in the tests of exchanges."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard import Routing, Workload, default_registry
from tokenyard.permutations import TorchPermutation
from tokenyard_parallel.exchanges import ExchangeError, _counts

DIM, EXPERTS, TOP_K, TOKENS = 8, 8, 2, 20


def made(name, chunks, validate=False):
    workload = Workload(DIM, 12, EXPERTS, TOP_K, expert_parallel=dist.get_world_size())
    options = {"name": name, "chunks": chunks, "validate": validate}
    chosen = default_registry().choose("exchange", options, workload)
    return chosen.construct(workload, TorchPermutation(workload), dist.group.WORLD)


def routed(tokens, width=DIM):
    torch.manual_seed(dist.get_rank())
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    x, weights = (
        torch.randn(tokens, width, requires_grad=True),
        torch.rand(tokens, TOP_K, requires_grad=True),
    )
    return x, Routing(ids, weights, torch.zeros(tokens, EXPERTS))


def compute(rows, ids, weights, bound=None):
    return rows * weights.sum(1, keepdim=True)


def spoilt(name, chunks, spoil):
    """Exchange with a mistake on rank 1; return the sentence that the exchange ends with."""
    mistaken = dist.get_rank() == 1
    exchange = made(name, chunks + (mistaken and spoil == "chunks"), validate=True)
    x, routing = routed(TOKENS, 6 if mistaken and spoil == "width" else DIM)
    sort, all_to_all = exchange.row_format.sort, dist.all_to_all_single
    if mistaken and spoil == "slots":
        first = iter([1])
        exchange.row_format.sort = lambda ids: sort(ids)._replace(
            slots=sort(ids).slots + _at_first(next(first, 0))
        )
    if mistaken and spoil == "told":
        _counts.dist.all_to_all_single = lambda out, sent, group: (
            all_to_all(out, sent, group=group),
            out.add_(1),
        )
    try:
        exchange(x, routing, compute)
    except ExchangeError as error:
        return str(error)
    finally:
        dist.all_to_all_single = all_to_all
    return "exchanged"


def _at_first(more):
    return torch.tensor([more, 0], dtype=torch.int32)


class CopiesToHost(TorchDispatchMode):
    """Counts what a GPU's host would have to wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return function(*args, **(kwargs or {}))


def copies_to_host(name, chunks):
    """Return how often tensors are read by the host, forward and backward."""
    exchange, (x, routing) = made(name, chunks), routed(TOKENS)
    lists, tolist = [], torch.Tensor.tolist
    torch.Tensor.tolist = lambda tensor: lists.append(1) or tolist(tensor)
    try:
        with CopiesToHost() as seen:
            y = exchange(x, routing, compute)
            forward = len(lists) + seen.count
            y.sum().backward()
        return forward, len(lists) + seen.count - forward
    finally:
        torch.Tensor.tolist = tolist


def rows_a_token(name):
    """Return how many rows the exchange says to come for each token, and how many came."""
    exchange, (x, routing), came = made(name, 1), routed(2000), []
    exchange(x, routing, lambda rows, *rest: came.append(len(rows)) or compute(rows, *rest))
    return exchange.received, came[0] / 2000
