"""The steps of a run, one after another, so that a GPU does not wait for the host between two."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.microbatch import Accumulated
from tokenyard_train.engine.nonfinite import raise_if_too_many_skipped
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.step import begin_step, end_step
from tokenyard_train.engine.step_records import Clock
from tokenyard_train.engine.step_result import Step, StepInFlight


class Times(NamedTuple):
    """Seconds that a step took, and those that remain for the run."""

    step: float
    remaining: float


class _Launch(NamedTuple):
    """The launched forward and backward passes of a step."""

    time: float  # seconds, by the clock of the host
    accumulated: Accumulated


class Steps:
    """Takes the steps of a run. `callbacks` are those that the run calls between steps."""

    def __init__(self, run: Run, callbacks: Sequence[Callback]):
        self.run = run
        waits = any(map(_follows_steps, callbacks)) or _may_change(run.setup)
        # Ranks that launch a step at other times than others would wait for them in a save
        self.waits = run.setup.on_any_rank(waits)
        self._clock = Clock(run.batch)
        self._next: _Launch | Exception | None = None  # of the next step, if it was launched early
        self._last_end = 0.0  # seconds, by the clock of the host

    def take(self, flags: Callable[[], Sequence[bool]]) -> tuple[Step, Times]:
        """Take a step, and advance the run by it.

        `flags` returns those of ``train_step``. It is called once the passes are launched, which
        takes most of a step without a GPU. Raises NonFiniteError, and whatever fails in a step.
        """
        run = self.run
        launch, self._next = self._next, None
        if isinstance(launch, Exception):
            raise launch
        launch = launch or self._launch(run.batch)
        in_flight = end_step(run.setup, run.batch, launch.accumulated, flags())
        if self._launches_early():
            self._next = self._try_launch(run.batch + 1)
        return self._end(launch, in_flight)

    def check_launch(self) -> None:
        """Raise the error of an early launch if there are several ranks.

        The others may be in the collectives of the launched step: this rank cannot save with them.
        """
        if isinstance(self._next, Exception) and self.run.setup.strategy.data[1] > 1:
            raise self._next

    def _launch(self, batch: int) -> _Launch:
        return _Launch(time.perf_counter(), begin_step(self.run.setup, batch))

    def _try_launch(self, batch: int) -> _Launch | Exception:
        """Launch a step. Return an error, which `take` raises for that step."""
        try:
            return self._launch(batch)
        except Exception as error:
            return error

    def _launches_early(self) -> bool:
        """Return whether the next step is launched before the numbers of this one have arrived.

        That needs a CUDA graph, which the host launches at once, and nothing but the report between
        both steps: callbacks may read and change anything. If a rank asks to stop, the launched
        passes are dropped, so they must change nothing that is saved.
        """
        setup = self.run.setup
        done = self.run.batch + 1
        intervals = (setup.config.eval_interval, setup.config.save_interval)
        between = self.waits or any(setup.due(each, done) for each in intervals)
        return setup.replays and not between and done < setup.batches

    def _end(self, launch: _Launch, in_flight: StepInFlight) -> tuple[Step, Times]:
        """Wait for a step, and advance the run by it."""
        run = self.run
        step = in_flight.wait()
        now = time.perf_counter()
        seconds = now - max(launch.time, self._last_end)
        self._last_end = now
        skipped = 0
        if step.skipped is not None:
            raise_if_too_many_skipped(run, step.skipped)
            skipped = run.position.skipped_in_a_row + 1
        run.position = replace(run.position, batch=run.batch + 1, skipped_in_a_row=skipped)
        return step, Times(seconds, self._clock.remaining(run.batch, run.setup.batches))


def _follows_steps(callback: Callback) -> bool:
    """Return whether a callback acts after steps, and not only after evaluations and saves."""
    kind = type(callback)
    return kind.batch_end is not Callback.batch_end or kind.skipped is not Callback.skipped


def _may_change(setup: Setup) -> bool:
    """Return whether the model has buffers, which a pass may change. Those of routers it may not.

    A step that is launched early may be dropped, and a checkpoint would hold what it changed.
    """
    routers = [moe.get_submodule("router") for moe in setup.layers]
    kept = {id(buffer) for router in routers for buffer in router.buffers()}
    return any(id(buffer) not in kept for buffer in setup.model.buffers())
