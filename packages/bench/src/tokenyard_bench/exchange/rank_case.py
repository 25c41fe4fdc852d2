"""One rank's part of a layer: its tokens, and the experts that it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenyard import Workload
from tokenyard_bench.case import Case, busiest
from tokenyard_bench.entrants import build_moe


@dataclass(frozen=True)
class RankCase:
    """The tokens and experts of one rank. x, topk_weights, up and down are leaves with grad.

    T tokens a rank, R ranks; `whole` is the same layer on one rank, with R*T tokens.
    """

    whole: Case  # with the ids and weights that its router selected
    all_ids: Tensor  # [R*T, K]
    rank: int
    workload: Workload
    x: Tensor  # [T, D]
    topk_ids: Tensor  # [T, K], of all experts
    topk_weights: Tensor  # [T, K]
    up: Tensor  # [E / R, 2F or F, D]
    down: Tensor  # [E / R, D, F]
    dy: Tensor  # [T, D]

    @property
    def slots(self) -> int:
        """Number of (token, expert) pairs of the rank's tokens, T*K."""
        return self.topk_ids.numel()

    @property
    def first_token(self) -> int:
        """The rank's first token in `whole`."""
        return self.rank * self.x.shape[0]

    @property
    def first_expert(self) -> int:
        """The rank's first expert in `whole`."""
        return self.rank * self.up.shape[0]

    def leaves(self) -> list[Tensor]:
        """Return the tensors whose gradients are computed."""
        return [self.x, self.topk_weights, self.up, self.down]

    def busiest(self) -> tuple[float, float]:
        """Return the slots of the busiest expert and of the busiest rank, over their means."""
        ranks = self.workload.expert_parallel
        by_rank = self.all_ids // self.up.shape[0]
        return busiest(self.all_ids, self.workload.num_experts), busiest(by_rank, ranks)


def part_of(case: Case, rank: int, ranks: int) -> RankCase:
    """Route a case by its router, and return a rank's part. `ranks` divides tokens and experts."""
    with torch.no_grad():
        routing = build_moe(case).router(case.x, case.topk_ids)
    whole = replace(case, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights)

    def part(tensor: Tensor) -> Tensor:
        return tensor.detach().tensor_split(ranks)[rank]

    return RankCase(
        whole=whole,
        all_ids=routing.topk_ids,
        rank=rank,
        workload=replace(case.workload, expert_parallel=ranks),
        x=part(case.x).requires_grad_(),
        topk_ids=part(routing.topk_ids).int().contiguous(),
        topk_weights=part(routing.topk_weights).requires_grad_(),
        up=part(case.up).requires_grad_(),
        down=part(case.down).requires_grad_(),
        dy=part(case.dy),
    )
