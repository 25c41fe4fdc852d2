"""One implementation of a case's layer, as it is checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenyard import Routing
from tokenyard.measure.timing import Stages
from tokenyard_bench.case import Case

Layer = Callable[[], tuple[Tensor, Routing]]
Group = Literal["backend", "peer"]


class Results(NamedTuple):
    """What an entrant computes for a case."""

    y: Tensor  # [T, D]
    topk_ids: Tensor  # [T, K]
    dx: Tensor  # [T, D]
    dup: Tensor  # [E, 2F or F, D], with the rows in the order of the case's weight
    ddown: Tensor  # [E, D, F]


@dataclass(frozen=True)
class Entrant:
    """An implementation of a case's layer. `layer()` returns the output [T, D] and the routing."""

    name: str
    group: Group
    layer: Layer

    def forward(self) -> Tensor:
        """Return the output [T, D]. This is what is timed."""
        return self.layer()[0]

    def leaves(self, case: Case) -> list[Tensor]:
        """Return the tensors whose gradients are computed: x, router, up and down."""
        return case.leaves()

    def stages(self, case: Case) -> Stages:
        """Return the forward and the backward pass."""
        leaves = self.leaves(case)
        return (lambda _: self.forward(), lambda y: torch.autograd.grad(y, leaves, case.dy))

    def results(self, case: Case) -> Results:
        """Run both passes, and return what the oracle checks."""
        y, routing = self.layer()
        dx, _, dup, ddown = torch.autograd.grad(y, self.leaves(case), case.dy)
        return Results(y.detach(), routing.topk_ids.detach(), dx, dup, ddown)


@dataclass(frozen=True)
class SkippedEntrant:
    """An implementation that cannot run this case, with the reason as one sentence."""

    name: str
    group: Group
    reason: str
