"""The pipeline of all exchanges: dispatch, compute and combine chunks of tokens.

The rows of each chunk are sorted by the rank that they go to. The counts of all chunks are
exchanged at once and copied to the host at once: that is the only host sync. Then every chunk is
dispatched. While one chunk is computed, later chunks arrive and the results of earlier chunks
return.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenyard import Compute, ConfigError, Permutation, Plan, Routing, Workload
from tokenyard.fp8 import why_no_fp8
from tokenyard.packed_rows import packed_width
from tokenyard_parallel.exchanges._counts import ChunkCounts, compare_kinds, exchange_counts
from tokenyard_parallel.exchanges._in_fp8 import Fp8Transfer
from tokenyard_parallel.exchanges._transfer import ExchangeError, Transfer

Precision = Literal["fp8"]

_WIDE = 4  # bytes of a weight, at least


class RankOrder(NamedTuple):
    """The rows of a chunk, sorted by the rank that they go to."""

    plan: Plan  # its "experts" are ranks
    slots: Tensor  # [ranks] int32: expert slots that go to each rank


class RowFormat(Protocol):
    """What one row of the payload is: a slot or a token."""

    rows_per_token: float  # rows that a rank sends for each token when routing is uniform
    weights_per_row: int  # W

    def sort(self, topk_ids: Tensor) -> RankOrder:
        """Sort the rows of topk_ids [T, K] by the rank that they go to."""
        ...

    def metadata(self, plan: Plan, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return [R, 2W] for the R rows: W weights, then W expert ids local to the rank."""
        ...


class PipelinedExchange:
    """Sends rows to the ranks that hold their experts, and returns each token's sum.

    Each rank of the group holds equally many experts.

    `chunks` is the number of parts that a rank's tokens travel in. `validate` compares what the
    ranks are about to exchange. It raises ExchangeError where they disagree, instead of a hang or a
    crash in the collective. It is for debugging: each call takes three more collectives and their
    host syncs.

    With `precision` "fp8", tokens travel in float8 e4m3 with a scale for each 128 numbers
    (``tokenyard.fp8``) when they are dispatched, and the gradient of the output when it is. What is
    summed travels in the dtype of x: results, and the gradient of the tokens.

    Raises ConfigError for other `chunks` and another `precision`, and for tokens that FP8 cannot
    have.
    """

    def __init__(
        self,
        row_format: RowFormat,
        workload: Workload,
        permutation: Permutation,
        group: Any,
        chunks: int,
        validate: bool,
        precision: Precision | None,
    ):
        if not isinstance(chunks, int) or chunks < 1:
            raise ConfigError(
                f"backends.exchange.chunks is {chunks!r}; give a whole number from 1 on"
            )
        _check_precision(precision, workload)
        self.row_format = row_format
        self.workload = workload
        self.permutation = permutation
        self.group = group
        self.chunks = chunks
        self.validate = validate
        self.precision = precision
        self.rows_per_token = row_format.rows_per_token if workload.expert_parallel > 1 else 0.0

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """Return y [T, D] for tokens x [T, D].

        Expert ids count the experts of all ranks in `routing`, and those of this rank in `compute`.
        Raises ExchangeError without a process group, or if `validate` finds that ranks disagree.
        """
        if self.workload.expert_parallel == 1:
            return compute(x, routing.topk_ids, routing.topk_weights)
        if self.group is None:
            raise ExchangeError(
                f"expert_parallel is {self.workload.expert_parallel}, and the exchange has no "
                "process group; lay the model out by a strategy, such as fsdp"
            )
        if self.validate:
            compare_kinds(self.group, self.chunks, x, routing, self.row_bytes(x.element_size()))
        ids_by_chunk = routing.topk_ids.tensor_split(self.chunks)
        orders = [self.row_format.sort(ids) for ids in ids_by_chunk]
        transfers = [
            ChunkTransfer(self, *parts)
            for parts in zip(
                x.tensor_split(self.chunks),
                ids_by_chunk,
                routing.topk_weights.tensor_split(self.chunks),
                orders,
                self._counts(routing.topk_ids, orders),
            )
        ]
        for transfer in transfers:
            transfer.dispatch()
        for transfer in transfers:
            transfer.compute(compute)
        parts = [transfer.combine() for transfer in transfers]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a dispatched row, of numbers of `width` bytes before it is packed."""
        dim = self.workload.dim
        return width * dim if self.precision is None else packed_width(dim)

    def sent_bytes_per_token(self, width: int) -> int:
        """Return the bytes that a rank sends to others for each of its tokens, each way.

        `width` are the bytes of the compute dtype. Routing is uniform.
        """
        returned = width * self.workload.dim
        metadata = 2 * self.row_format.weights_per_row * max(width, _WIDE)
        to_others = self.rows_per_token * (1 - 1 / self.workload.expert_parallel)
        return round(to_others * (self.row_bytes(width) + metadata + returned))

    def _counts(self, topk_ids: Tensor, orders: list[RankOrder]) -> list[ChunkCounts]:
        by_chunk = [torch.stack((order.plan.offsets.diff(), order.slots), 1) for order in orders]
        sent = torch.stack(by_chunk, 1)  # [ranks, chunks, 2]
        kept = (topk_ids < self.workload.num_experts).sum() if self.validate else None
        return exchange_counts(sent, self.group, kept)


def _check_precision(precision: Precision | None, workload: Workload) -> None:
    """Raise ConfigError unless tokens of a workload can travel in a precision."""
    if precision not in ("fp8", None):
        raise ConfigError(
            f"backends.exchange.precision is {precision!r}; known is: fp8, and without it tokens "
            "have the dtype of x"
        )
    reason = why_no_fp8(workload.dim) if precision == "fp8" else None
    if reason is not None:
        raise ConfigError(f"the exchange cannot send tokens in FP8: {reason}")


class ChunkTransfer:
    """One chunk of tokens: dispatched to the ranks of its experts, computed, and combined."""

    def __init__(
        self,
        exchange: PipelinedExchange,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        order: RankOrder,
        counts: ChunkCounts,
    ):
        # the host knows the number of rows now, so the plan keeps no tail
        plan = order.plan._replace(order=order.plan.order[: sum(counts.sent)])
        self.plan = plan
        self.permutation = exchange.permutation
        self.slots = counts.slots
        self.in_fp8 = exchange.precision == "fp8"
        self.rows = x if self.in_fp8 else self.permutation.permute(x, plan)
        self.metadata = exchange.row_format.metadata(plan, topk_ids, topk_weights)
        out = (exchange.group, counts.sent, counts.received)
        back = (exchange.group, counts.received, counts.sent)
        self.metadata_transfer = Transfer(*out)
        self.row_transfer = Transfer(*out)
        self.return_transfer = Transfer(*back)
        if self.in_fp8:  # these two permute
            self.row_transfer = Fp8Transfer(*out, plan, self.permutation, packs="forward")
            self.return_transfer = Fp8Transfer(*back, plan, self.permutation, packs="backward")

    def dispatch(self) -> None:
        """Start to send the rows and their metadata."""
        self.metadata = self.metadata_transfer.begin(self.metadata)
        self.rows = self.row_transfer.begin(self.rows)

    def compute(self, compute: Compute) -> None:
        """Compute the received rows, and start to send the results back."""
        weights, ids = self.metadata_transfer.end(self.metadata).chunk(2, dim=1)
        rows = self.row_transfer.end(self.rows)
        y = compute(rows, ids.detach().to(torch.int32), weights.contiguous(), self.slots)
        self.rows = self.return_transfer.begin(y)

    def combine(self) -> Tensor:
        """Return the tokens [T, D] of the chunk, each the sum of its rows."""
        rows = self.return_transfer.end(self.rows)
        return rows if self.in_fp8 else self.permutation.unpermute(rows, self.plan, None)
