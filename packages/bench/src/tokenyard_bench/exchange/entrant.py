"""One implementation of an expert-parallel layer, as it is checked and timed on a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenyard.measure.timing import Stages
from tokenyard_bench.exchange.marks import MarkedForward
from tokenyard_bench.exchange.rank_case import RankCase
from tokenyard_bench.oracle import Results, Verdict, judge_sample, sampled_experts, sampled_tokens

Group = Literal["exchange", "peer"]


@dataclass(frozen=True)
class RankEntrant:
    """A layer on a rank. `forward()` returns the output [T, D] of the rank's tokens."""

    case: RankCase
    forward: Callable[[], Tensor]
    leaves: list[Tensor]  # x, topk_weights, and the weights of the rank's experts
    marked: MarkedForward | None = None

    def stages(self) -> Stages:
        """Return the forward and the backward pass."""
        return (lambda _: self.forward(), self.backward)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves."""
        return torch.autograd.grad(y, self.leaves, self.case.dy)

    def results(self) -> Results:
        """Run both passes, and return what the oracle checks."""
        y = self.forward()
        return {"y": y.detach()} | self.named(self.backward(y))

    def named(self, gradients: tuple[Tensor, ...]) -> Results:
        """Return the gradients by name, those of the weights in the shapes of the case."""
        return dict(zip(("d x", "d weights", "d up", "d down"), gradients))


@dataclass(frozen=True)
class Candidate:
    """An entrant before it is built: why it is unusable, if it is, and how to build it."""

    name: str
    group: Group
    unusable: str | None
    build: Callable[[], RankEntrant]
    in_fp8: bool = False  # computes or sends numbers in FP8


def judge_rank(case: RankCase, results: Results) -> Verdict:
    """Compare a sample of a rank's results with float64."""
    ids = case.all_ids
    held = case.up.shape[0]
    tokens = sampled_tokens(case.x.shape[0], case.x.device)
    # Experts of other ranks count as one more, which is not sampled.
    here = torch.where(ids // held == case.rank, ids - case.first_expert, held)
    experts = sampled_experts(here, held)
    sample = {name: results[name][tokens] for name in ("y", "d x", "d weights")}
    sample |= {name: results[name][experts] for name in ("d up", "d down")}
    return judge_sample(
        case.whole,
        ids,
        tokens + case.first_token,
        [case.first_expert + expert for expert in experts],
        sample,
    )
