"""The time of each phase of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

Phases = Callable[[str], AbstractContextManager[Any]]
"""A context for each phase of a step: data, forward, backward, optimizer.

With a CUDA graph, forward and backward are one phase, "forward and backward".
"""


def untimed(phase: str) -> AbstractContextManager[None]:
    """Context: do nothing around a phase."""
    return nullcontext()


class Stopwatch:
    """Accumulates time per phase from the caller's timestamps. Synchronises only in `totals`."""

    def __init__(self, stamp: Callable[[], Any]):
        self.stamp = stamp
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Context: time a phase."""
        began = self.stamp()
        yield
        self.spans.append((phase, began, self.stamp()))

    def totals(self, between: Callable[[Any, Any], float]) -> dict[str, float]:
        """Return the time of each phase. `between` returns the time between two timestamps."""
        totals: dict[str, float] = {}
        for phase, began, ended in self.spans:
            totals[phase] = totals.get(phase, 0.0) + between(began, ended)
        return totals
