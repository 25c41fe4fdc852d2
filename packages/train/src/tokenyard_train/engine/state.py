"""A run in progress: its setup, its position, and the requests to stop it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tokenyard_train.config.duration import Span
from tokenyard_train.engine.setup import Setup
from tokenyard_train.records.metrics import Metrics


class Base(NamedTuple):
    """The weights that the adapters of a run belong to; see ``tokenyard_train.engine.base``."""

    path: str | None  # a checkpoint, or hf:// and a folder; None: the initial weights of `seed`
    seed: int
    digest: str


@dataclass(frozen=True)
class Position:
    """How far a run is. A checkpoint holds it."""

    batch: int = 0  # optimizer steps done, skipped ones included
    skipped_in_a_row: int = 0  # the last of them, if they were skipped
    base: Base | None = None  # None: checkpoints hold the whole model


@dataclass
class StopRequests:
    """Requests to stop a run."""

    by_signal: bool = False  # to this process; all ranks stop at the end of a step
    by_callback: bool = False  # on every rank; the step just done is the last one


@dataclass
class Run:
    """A run in progress, as callbacks see it. Only ``engine/steps.py`` assigns to `position`."""

    setup: Setup
    metrics: Metrics
    position: Position = field(default_factory=Position)
    stop_requests: StopRequests = field(default_factory=StopRequests)

    @property
    def batch(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return self.position.batch

    @property
    def finished(self) -> bool:
        """Whether no step is left to take."""
        return self.stop_requests.by_callback or self.batch >= self.setup.batches

    def stop_training(self) -> None:
        """Make the step just done the last one. The run then ends as if its duration was reached.

        Every rank must call this after the same step. A checkpoint does not hold the request: with
        `autoresume`, a run that a callback stopped trains on to its duration.
        """
        self.stop_requests.by_callback = True

    def due(self, interval: Span | None) -> bool:
        """Return whether the step just done ends an interval."""
        return self.setup.due(interval, self.batch)
