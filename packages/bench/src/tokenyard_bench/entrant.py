"""One implementation of a case's layer, as it is checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tokenyard import Routing
from tokenyard.measure.timing import Stages
from tokenyard_bench.case import Case

Layer = Callable[[], tuple[Tensor, Routing]]
Group = Literal["backend", "peer"]

COARSE = 8
"""FP8, and peers that accumulate in lower precision, may be this many times less exact."""


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
    looser: int = 1  # its error may be this many times that which a backend in 16 bits may have

    def forward(self) -> Tensor:
        """Return the output [T, D]. This is what is timed."""
        return self.layer()[0]

    def leaves(self, case: Case) -> list[Tensor]:
        """Return the tensors whose gradients are computed: x, router, up and down."""
        return case.leaves()

    def stages(self, case: Case, microbatches: int = 1) -> Stages:
        """Return the forward pass, and the rest of a step.

        The rest is the backward pass, and both passes of further microbatches. Weights have a new
        version at first, as after an optimizer step: a backend that keeps copies makes them again.
        """
        leaves = self.leaves(case)

        def forward(_: object) -> Tensor:
            increment_version([case.up, case.down])
            return self.forward()

        def rest(y: Tensor) -> None:
            torch.autograd.grad(y, leaves, case.dy)
            for _ in range(microbatches - 1):
                torch.autograd.grad(self.forward(), leaves, case.dy)

        return (forward, rest)

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
