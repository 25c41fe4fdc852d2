"""What exchanges have in common: chunks of tokens travel, are computed, and travel back, overlapping each other.

Each chunk's rows are sorted by the rank that they go to. All chunks' counts are exchanged at once and copied to the
host at once, which is all that the host waits for. Then every chunk is sent off; while one is computed, the later ones
arrive and the earlier ones' results go home.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenyard import Compute, ConfigError, Permutation, Plan, Routing, Workload
from tokenyard_parallel.exchanges._counts import Counts, compare_kinds, exchange_counts
from tokenyard_parallel.exchanges._transfer import ExchangeError, Transfer


class Sorted(NamedTuple):
    """A chunk's rows, lined up by the rank that they go to."""

    plan: Plan  # "experts" are ranks
    slots: Tensor  # [ranks] int32: expert slots that go to each


class Packing(Protocol):
    """What a row is: a slot, or a token."""

    rows: float  # for each token, when all experts get the same

    def sort(self, topk_ids: Tensor) -> Sorted:
        """Line up the rows of topk_ids [T, K] by the rank that they go to."""
        ...

    def describe(self, plan: Plan, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return for each row [R, 2W] its W weights, and as many expert ids on the rank that it goes to."""
        ...


class PipelinedExchange:
    """Sends rows to the ranks of a group that hold their experts, equally many on each, and brings the sums back.

    `chunks` are how many parts a rank's tokens travel in; `validate` compares what the ranks are about to exchange, and
    raises ExchangeError where they disagree, in place of a hang or of a crash in the collective (for debugging: it
    takes two more collectives and host waits a call).
    """

    def __init__(
        self,
        packing: Packing,
        workload: Workload,
        permutation: Permutation,
        group: Any,
        chunks: int,
        validate: bool,
    ):
        if not isinstance(chunks, int) or chunks < 1:
            raise ConfigError(
                f"backends.exchange.chunks is {chunks!r}; give a whole number from 1 on"
            )
        self.packing, self.workload, self.permutation, self.group = (
            packing,
            workload,
            permutation,
            group,
        )
        self.chunks, self.validate = chunks, validate
        self.received = packing.rows if workload.expert_parallel > 1 else 0.0

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """Return y [T, D] for tokens x [T, D]; ids count over all ranks here, and over this rank's in `compute`."""
        if self.workload.expert_parallel == 1:
            return compute(x, routing.topk_ids, routing.topk_weights)
        if self.group is None:
            raise ExchangeError(
                f"expert_parallel is {self.workload.expert_parallel}, and the exchange has no process group; lay the "
                "model out by a strategy, such as fsdp"
            )
        if self.validate:
            compare_kinds(self.group, self.chunks, x, routing)
        tokens, ids, weights = (
            t.tensor_split(self.chunks) for t in (x, routing.topk_ids, routing.topk_weights)
        )
        sortings = [self.packing.sort(i) for i in ids]
        counts = self._counts(routing.topk_ids, sortings)
        trips = [Trip(self, *parts) for parts in zip(tokens, ids, weights, sortings, counts)]
        for trip in trips:
            trip.depart()
        for trip in trips:
            trip.compute(compute)
        return torch.cat([trip.come_home() for trip in trips])

    def _counts(self, topk_ids: Tensor, sortings: list[Sorted]) -> list[Counts]:
        sent = torch.stack([torch.stack((s.plan.offsets.diff(), s.slots), 1) for s in sortings], 1)
        kept = (topk_ids < self.workload.num_experts).sum() if self.validate else None
        return exchange_counts(sent, self.group, kept)


class Trip:
    """One chunk of tokens on its way."""

    def __init__(
        self,
        hub: PipelinedExchange,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        sorting: Sorted,
        counts: Counts,
    ):
        plan = sorting.plan
        self.plan = plan._replace(order=plan.order[: sum(counts.sent)])
        self.permutation, self.slots = hub.permutation, counts.slots
        self.rows = self.permutation.permute(x, self.plan)
        self.described = hub.packing.describe(self.plan, ids, weights)
        there = (hub.group, counts.sent, counts.received)
        self.rows_there, self.described_there = Transfer(*there), Transfer(*there)
        self.back = Transfer(hub.group, counts.received, counts.sent)

    def depart(self) -> None:
        """Send the rows and what describes them."""
        self.described = self.described_there.begin(self.described)
        self.rows = self.rows_there.begin(self.rows)

    def compute(self, compute: Compute) -> None:
        """Compute the rows that arrived, and send the results back."""
        weights, ids = self.described_there.end(self.described).chunk(2, dim=1)
        rows = self.rows_there.end(self.rows)
        y = compute(rows, ids.detach().to(torch.int32), weights.contiguous(), self.slots)
        self.rows = self.back.begin(y)

    def come_home(self) -> Tensor:
        """Return the chunk's tokens [T, D], each the sum of its rows."""
        return self.permutation.unpermute(self.back.end(self.rows), self.plan, None)
