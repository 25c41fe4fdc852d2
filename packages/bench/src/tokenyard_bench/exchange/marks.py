"""Where a pass through an exchange spends its time, from outside of the exchange.

An exchange calls a permutation and a function that computes experts. Both are wrapped. Each wrapper
stamps the time where a stage ends: in the forward pass when it is called or returns, in the
backward pass when the gradient of its tensor is complete. So the stages of any exchange are known,
and they add up to the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from tokenyard import Compute, Permutation, Plan

STAGES = ("plan", "counts", "gather", "dispatch", "experts", "return", "combine")
"""In the order of a forward pass. A backward pass has those from gather on, in reverse."""


class Marks:
    """The ends of the stages of one forward and one backward pass."""

    def __init__(self, stamp: Callable[[], Any]):
        self.stamp = stamp
        self.ends: list[tuple[str, str]] = []  # direction, and the stage that ends
        self.hooks: list[Any] = []
        self.stamps = [stamp()]

    def end(self, direction: str, stage: str) -> None:
        """Mark the end of a stage."""
        self.ends.append((direction, stage))
        self.stamps.append(self.stamp())

    def has(self, direction: str, stage: str) -> bool:
        """Return whether a stage has ended in that direction."""
        return (direction, stage) in self.ends

    def end_at_gradient(self, tensor: Tensor, stage: str) -> None:
        """Mark the end of a stage of the backward pass, where a tensor's gradient is complete."""
        if tensor.requires_grad:
            self.hooks.append(tensor.register_hook(lambda gradient: self.end("backward", stage)))

    def times(self, between: Callable[[Sequence[Any]], list[float]]) -> dict[str, list[float]]:
        """Return the milliseconds of each of STAGES by direction. `between` is that of a clock.

        Removes the hooks on gradients: a tensor may be an input that the next pass has, too.
        """
        for hook in self.hooks:
            hook.remove()
        times = {direction: [0.0] * len(STAGES) for direction in ("forward", "backward")}
        for (direction, stage), (begin, end) in zip(
            self.ends, pairwise([0.0, *between(self.stamps)])
        ):
            times[direction][STAGES.index(stage)] += end - begin
        return times


MarkedForward = Callable[[Marks], Tensor]
"""A forward pass with marks at the ends of its stages."""


class MarkedPermutation:
    """A permutation that marks the stages of the exchange that calls it in `marks`."""

    marks: Marks

    def __init__(self, permutation: Permutation):
        self.permutation = permutation

    def plan(self, topk_ids: Tensor, num_experts: int, rows: int | None = None) -> Plan:
        """Return the plan."""
        plan = self.permutation.plan(topk_ids, num_experts, rows)
        self.marks.end("forward", "plan")
        return plan

    def permute(self, x: Tensor, plan: Plan) -> Tensor:
        """Return the rows that are sent."""
        # With several chunks, the next one begins after a part of the dispatch of the last.
        first = not self.marks.has("forward", "gather")
        self.marks.end("forward", "counts" if first else "dispatch")
        rows = self.permutation.permute(x, plan)
        self.marks.end("forward", "gather")
        self.marks.end_at_gradient(rows, "dispatch")
        return rows

    def unpermute(self, rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
        """Return the sum of each token's rows."""
        self.marks.end("forward", "return")
        self.marks.end_at_gradient(rows, "combine")
        y = self.permutation.unpermute(rows, plan, topk_weights)
        self.marks.end("forward", "combine")
        return y


def marked_compute(compute: Compute, marks: Marks) -> Compute:
    """Return a function that computes experts and marks the stages around it."""

    def marked(x: Tensor, *arguments: Any) -> Tensor:
        marks.end("forward", "dispatch")
        marks.end_at_gradient(x, "experts")
        y = compute(x, *arguments)
        marks.end("forward", "experts")
        marks.end_at_gradient(y, "return")
        return y

    return marked


def end_pass(marks: Marks, direction: str) -> None:
    """Mark the end of a pass: of its last stage that the exchange has."""
    if direction == "forward":
        marks.end(direction, "combine" if marks.has(direction, "combine") else "return")
    else:
        marks.end(direction, "gather" if marks.has(direction, "dispatch") else "dispatch")
