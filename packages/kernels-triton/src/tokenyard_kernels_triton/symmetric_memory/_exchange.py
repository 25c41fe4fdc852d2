"""The exchange `symmetric_memory`: ranks of one node read tokens from each other's memory.

A token travels at most once to each rank, as with `all_to_all_tokens`. The number of rows that a
rank receives is known before: tokens of rank s have the rows from ``s * C`` on, where no rank has
more than C tokens. So no count is exchanged, nothing is sorted before the trip, and the host waits
for no rank. Only the experts' rows need a bound, because each rank may get most slots of all.

The host reads the counts after it has launched the experts, so the GPU has work meanwhile. If the
bound was too small, the experts of that rank compute again with a sufficient one. No slot is ever
dropped, and the result does not depend on the bound. If a rank had more than C tokens, all ranks
see that, make their buffers larger, and start again. A recompute must do what its forward pass did.
So it also starts with the small buffers: larger ones are used first from the next forward pass on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard import BackendError, Compute, ConfigError, Permutation, Routing, Workload
from tokenyard_kernels_triton.symmetric_memory._agreement import most_tokens
from tokenyard_kernels_triton.symmetric_memory._buffer import REGIONS, connect
from tokenyard_kernels_triton.symmetric_memory._late_read import LateRead
from tokenyard_kernels_triton.symmetric_memory._ops import combine, dispatch
from tokenyard_kernels_triton.symmetric_memory._region import Sizes, layout_of
from tokenyard_kernels_triton.symmetric_memory._torch_private import group_timeout, in_backward

_WIDE = 4  # bytes of an id, and of a weight at least
_DTYPES = {dtype.itemsize: dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)}


class Received(NamedTuple):
    """What a rank receives: row ``s * C + t`` is token t of rank s."""

    rows: Tensor  # [n * C, D]
    weights: Tensor  # [n * C, K]
    ids: Tensor  # [n * C, K] of this rank's experts; E / n means dropped
    bounded_ids: Tensor  # [n * C, K] `ids`, or all dropped if there are more than the bound
    status: Tensor  # [n + 1] int32: the tokens of each rank, and the slots of this rank


class Reserved(NamedTuple):
    """The buffers of an exchange."""

    link: int  # the number of their link
    capacity: int  # C, most tokens of a rank
    bound: int  # most slots that experts compute without a second launch


class SymmetricMemoryExchange:
    """Reads tokens from the memory of the ranks that route them, and results from the experts'.

    `slots` bounds the slots that a rank computes without a second launch of its experts, as a
    multiple of the mean. Activations of so many slots are allocated.

    Raises ConfigError if `slots` is less than 1.
    """

    def __init__(
        self,
        workload: Workload,
        permutation: Permutation,
        group: Any = None,
        slots: float = 1.5,
    ):
        if not isinstance(slots, int | float) or not 1 <= slots < math.inf:
            raise ConfigError(f"backends.exchange.slots is {slots!r}; give a number from 1 on")
        self.workload = workload
        self.group = group
        self.slots = slots
        self.held = workload.num_experts // workload.expert_parallel
        self.kind: tuple[Any, ...] | None = None  # of the rows that the buffers are for
        self.reserved: Reserved
        self.larger: Reserved | None = None  # those that the last forward pass needed
        self.timeout = group_timeout(group, workload.device)
        self.status = LateRead(self.timeout)
        parallel = workload.expert_parallel > 1
        self.rows_per_token = float(workload.expert_parallel) if parallel else 0.0

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """Return y [T, D] for tokens x [T, D].

        Expert ids count the experts of all ranks in `routing`, and those of this rank in `compute`.
        Raises BackendError without a process group, or if its ranks are on several nodes or
        exchange different kinds of rows.
        """
        if self.workload.expert_parallel == 1:
            return compute(x, routing.topk_ids, routing.topk_weights)
        if self.group is None:
            raise BackendError(
                f"expert_parallel is {self.workload.expert_parallel}, and the exchange has no "
                "process group; lay the model out by a strategy, such as fsdp"
            )
        ids = routing.topk_ids
        weights = routing.topk_weights
        kind = (x.dtype, x.shape[1], weights.dtype, ids.shape[1])
        if kind != self.kind:
            self.reserved = self._reserve(most_tokens(self.group, x, weights), x, weights)
            self.kind = kind
            self.larger = None
        elif self.larger is not None and not in_backward():
            self.reserved = self.larger
            self.larger = None
        link, capacity, bound = self.reserved
        while True:
            received = Received(*dispatch(x, ids, weights, link, bound))
            self.status.mark(received.status)
            y = compute(received.rows, received.bounded_ids, received.weights, bound)
            *tokens, slots = self.status.read(received.status)
            if max(tokens) > capacity:
                self.larger = self._reserve(max(tokens), x, weights)
                link, capacity, bound = self.larger
                continue
            if slots > bound:
                del y  # free its activations first
                y = compute(received.rows, received.ids, received.weights, slots)
            y_tokens: Tensor = combine(y, received.ids, ids, link)
            return y_tokens

    def buffer_bytes(self, tokens: int, width: int) -> int:
        """Return the bytes of a rank's buffer for `tokens` tokens of each rank.

        `width` are the bytes of the compute dtype.
        """
        work = self.workload
        if work.expert_parallel == 1:
            return 0
        dtypes = (_DTYPES[width], _DTYPES[max(width, _WIDE)])
        sizes = Sizes(work.expert_parallel, tokens, work.dim, work.top_k, self.held, *dtypes)
        return REGIONS * layout_of(sizes).bytes

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of numbers of `width` bytes."""
        return width * self.workload.dim

    def sent_bytes_per_token(self, width: int) -> int:
        """Return the bytes that other ranks read of each token of a rank, and it of its results.

        `width` are the bytes of the compute dtype. Routing is uniform.
        """
        work = self.workload
        others = 1 - 1 / work.expert_parallel
        rows = work.ranks_per_token * others * 2 * self.row_bytes(width)
        weights = work.top_k * others * max(width, _WIDE)
        return round(rows + weights + work.top_k * _WIDE * (work.expert_parallel - 1))

    def _reserve(self, tokens: int, x: Tensor, weights: Tensor) -> Reserved:
        """Reserve buffers for `tokens` tokens of each rank; a collective."""
        top_k = weights.shape[1]
        ranks = self.workload.expert_parallel
        capacity = max(1, tokens)
        most = ranks * capacity * min(top_k, self.held)
        bound = min(most, math.ceil(self.slots * capacity * top_k))
        sizes = Sizes(ranks, capacity, x.shape[1], top_k, self.held, x.dtype, weights.dtype)
        link = connect(self.group, sizes, x.device, self.timeout)
        return Reserved(link, capacity, bound)
