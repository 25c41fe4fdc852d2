"""The training loop: step, evaluate, save and report until the duration is reached.

A run ends in one of five ways:

| end                          | last step saved | `Callback.end` | trackers' status |
|------------------------------|-----------------|----------------|------------------|
| duration reached             | yes             | called         | finished         |
| ``run.stop_training()``      | yes             | called         | finished         |
| signal (raises Stopped)      | yes             | not called     | failed           |
| not finite (NonFiniteError)  | not taken       | not called     | failed           |
| any other exception          | no              | not called     | failed           |
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tokenyard import TokenyardError
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.checkpoint.background import BackgroundWriter
from tokenyard_train.distributed import is_rank0
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.chosen import dump_with_backends
from tokenyard_train.engine.evaluate import evaluate
from tokenyard_train.engine.finish import RunResult, finish
from tokenyard_train.engine.nonfinite import NonFiniteError
from tokenyard_train.engine.progress import Progress
from tokenyard_train.engine.resume import resume, start
from tokenyard_train.engine.save import save
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.signals import Stopped, stopping
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.step_records import skipped_record, train_record
from tokenyard_train.engine.step_result import Step
from tokenyard_train.engine.steps import Steps, Times
from tokenyard_train.engine.summary import announce
from tokenyard_train.launch.watch import watch_collectives
from tokenyard_train.records.metrics import Metrics, NullMetrics
from tokenyard_train.records.trackers import build_trackers

log = logging.getLogger("tokenyard")


class Loop:
    """A run, its callbacks and its checkpoint writer."""

    def __init__(self, setup: Setup, callbacks: Sequence[Callback]):
        config = setup.config
        self.config = config
        self.callbacks = callbacks
        metrics = (Metrics if is_rank0() else NullMetrics)(setup.folder / "metrics.jsonl")
        self.writer = BackgroundWriter(
            setup.folder, config.save_num_checkpoints_to_keep, config.save_async, setup.device
        )
        position = resume(setup, metrics)
        if position.batch == 0:
            position = start(setup)
        setup.convert_weights()
        self.run = Run(setup, metrics, position)
        self.steps = Steps(self.run, callbacks)
        self.stop_agreed = False  # a rank received a signal, and all ranks know
        self.save_failed = False  # a background save failed on some rank

    def train_with_trackers(self) -> RunResult:
        """Train to the end. The trackers learn whether the run failed."""
        self._open_trackers()
        failed = True
        try:
            with watch_collectives(lambda: self.run.batch, self.run.setup.folder):
                result = self._train()
            failed = False
            return result
        except NonFiniteError:
            # Every rank raises this, so all can wait for the checkpoint that is being written.
            # Its failure must not replace the NonFiniteError.
            with suppress(CheckpointError):
                self._finish_saving()
            raise
        finally:
            self.run.metrics.trackers.finish(failed)

    def _open_trackers(self) -> None:
        if is_rank0():
            self.run.metrics.trackers = build_trackers(
                self.config.loggers,
                self.run.setup.folder,
                self.config.run_name,
                dump_with_backends(self.run.setup),
                self.run.batch,
            )

    def _train(self) -> RunResult:
        run = self.run
        announce(run)
        if run.batch == 0:
            self._start()
        with Progress(run) as progress, stopping(run.stop_requests):
            if run.batch == 0 and self.config.eval_first:
                self._evaluate(progress)
            while not (run.finished or self.stop_agreed):
                self._one_batch(progress)
        if not run.finished:
            raise Stopped(
                f"stopped as asked, after batch {run.batch} of {run.setup.batches}, which is saved "
                f"in {run.setup.folder}"
            )
        return finish(run, self.callbacks)

    def _start(self) -> None:
        for callback in self.callbacks:
            callback.start(self.run)
        if self.run.stop_requests.by_callback:
            raise TokenyardError(
                "a callback called stop_training() in start, before a step was taken; call it in "
                "batch_end, skipped or evaluated"
            )

    def _one_batch(self, progress: Progress) -> None:
        run = self.run
        step, times = self.steps.take(lambda: (run.stop_requests.by_signal, self.writer.failed))
        self.stop_agreed, self.save_failed = step.flags
        record = self._report(step, times, progress)
        self.steps.check_launch()
        self._after_step(step, record, progress)

    def _report(self, step: Step, times: Times, progress: Progress) -> dict[str, Any]:
        """Write and show the record of the step just done, and return it."""
        run = self.run
        if step.skipped is not None:
            record = skipped_record(run.batch, step.skipped)
        else:
            record = train_record(run.setup, run.batch, step.result, *times)
        run.metrics.write(record)
        progress.show(record)
        return record

    def _after_step(self, step: Step, record: dict[str, Any], progress: Progress) -> None:
        """Evaluate, call the callbacks and save, where that is due after the step just done."""
        run = self.run
        scored = run.finished or run.due(self.config.eval_interval)
        if scored:
            self._evaluate(progress)
        for callback in self.callbacks:
            if step.skipped is not None:
                callback.skipped(run, record)
            else:
                callback.batch_end(run, record)
        if run.finished and not scored:  # a callback stopped the run
            self._evaluate(progress)
        self._save()

    def _evaluate(self, progress: Progress) -> None:
        for kind in self.run.setup.data.held_out_sets():
            record = evaluate(self.run.setup, self.run.batch, kind)
            self.run.metrics.write(record)
            progress.show(record)
            for callback in self.callbacks:
                callback.evaluated(self.run, record)

    def _save(self) -> None:
        """Save if that is due after this step.

        With `save_async`, this waits only for the previous checkpoint, and at the end for the last.
        """
        if self.save_failed or self._save_is_due():
            self._finish_saving()
        if self._save_is_due():  # asked again: a callback may have stopped the run in `saved`
            save(self.run, self.writer)
        if self._is_last() or not self.config.save_async:
            self._finish_saving()

    def _is_last(self) -> bool:
        return self.stop_agreed or self.run.finished

    def _save_is_due(self) -> bool:
        return self._is_last() or self.run.due(self.config.save_interval)

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if there is one; tell the callbacks.

        A collective. Raises CheckpointError on every rank if a rank failed.
        """
        path = self.writer.finish()
        if path is not None:
            for callback in self.callbacks:
                callback.saved(self.run, path)
