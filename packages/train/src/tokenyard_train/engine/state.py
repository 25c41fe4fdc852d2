"""A run in progress: its setup, its position, and the requests to end it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenyard_train.config.duration import Span
from tokenyard_train.engine.setup import Setup
from tokenyard_train.records.metrics import Metrics


@dataclass(frozen=True)
class Position:
    """How far a run is. A checkpoint holds it."""

    batch: int = 0  # optimizer steps done, skipped ones included
    skipped: int = 0  # the last steps in a row that were skipped


@dataclass
class Signals:
    """Requests to end a run."""

    asked: bool = False  # this process received a signal; all ranks stop after the step
    last: bool = False  # a callback asked that the step just done be the last


@dataclass
class Run:
    """A run in progress, as callbacks see it. Only ``engine/loop.py`` assigns to `position`."""

    setup: Setup
    metrics: Metrics
    position: Position = field(default_factory=Position)
    signals: Signals = field(default_factory=Signals)

    @property
    def batch(self) -> int:
        """Optimizer steps done."""
        return self.position.batch

    @property
    def ends(self) -> bool:
        """Whether the step just done is the last one of the run."""
        return self.signals.last or self.batch >= self.setup.batches

    def stop_training(self) -> None:
        """Make the step just done the last one. Every rank must call this after the same step."""
        self.signals.last = True

    def due(self, interval: Span | None) -> bool:
        """Return whether the step just done ends an interval."""
        return interval is not None and self.batch % max(1, self.setup.span(interval)) == 0
