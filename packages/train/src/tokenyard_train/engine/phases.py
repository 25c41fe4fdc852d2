"""Where the time of a training step goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

Phases = Callable[[str], AbstractContextManager[Any]]
"""Wraps each part of a step (data, forward, backward, optimizer) in a context of its own."""


def untimed(phase: str) -> AbstractContextManager[None]:
    """Do nothing around a phase."""
    return nullcontext()


class Stopwatch:
    """Adds up what each phase takes, by somebody's stamps of time; waits for nothing before it is asked."""

    def __init__(self, stamp: Callable[[], Any]):
        self.stamp = stamp
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        began = self.stamp()
        yield
        self.spans.append((phase, began, self.stamp()))

    def totals(self, between: Callable[[Any, Any], float]) -> dict[str, float]:
        """Return the sum of each phase, by what the time between two stamps is."""
        totals: dict[str, float] = {}
        for phase, began, ended in self.spans:
            totals[phase] = totals.get(phase, 0.0) + between(began, ended)
        return totals
