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
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from tokenyard import ConfigError, Model, TokenyardError, why_no_documents
from tokenyard_train.checkpoint import CheckpointError, verify
from tokenyard_train.checkpoint.background import BackgroundWriter
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data, PackedDocuments, PackedHeldOut
from tokenyard_train.distributed import is_rank0
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.chosen import dump_with_backends
from tokenyard_train.engine.deterministic import deterministic
from tokenyard_train.engine.evaluate import evaluate
from tokenyard_train.engine.folder import run_folder
from tokenyard_train.engine.nonfinite import NonFiniteError, Skipped, raise_if_too_many_skipped
from tokenyard_train.engine.out_of_memory import out_of_memory_is_a_mistake
from tokenyard_train.engine.progress import Progress
from tokenyard_train.engine.resume import resume, start
from tokenyard_train.engine.save import save
from tokenyard_train.engine.setup import Setup, build_setup
from tokenyard_train.engine.signals import Stopped, stopping
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.step import train_step
from tokenyard_train.engine.step_records import Clock, skipped_record, train_record
from tokenyard_train.engine.summary import announce, summarize
from tokenyard_train.launch.faults import mark_started
from tokenyard_train.launch.watch import watch_collectives
from tokenyard_train.records.metrics import Metrics, NullMetrics
from tokenyard_train.records.trackers import build_trackers, check_trackers

log = logging.getLogger("tokenyard")


class RunResult(NamedTuple):
    """The result of a finished run."""

    folder: Path
    batches: int
    train_loss: float  # of the last step that was taken, nats per token; nan if none was
    bits_per_byte: float | None  # of the held-out text


def run_training(config: TrainConfig, console: Console, callbacks: Sequence[Callback]) -> RunResult:
    """Train by a resolved config. The caller builds the callbacks that the config names.

    Raises TokenyardError for a mistake in the config.
    """
    with deterministic(config.deterministic), out_of_memory_is_a_mistake(config):
        setup = build_setup(config, console, partial(check_run, config, callbacks))
        # The folder is made last, after everything that may fail before it.
        with run_folder(config):
            mark_started()
            return _Loop(setup, callbacks).train_with_trackers()


def check_run(config: TrainConfig, callbacks: Sequence[Callback], model: Model, data: Data) -> None:
    """Raise ConfigError for what the model, callbacks or trackers of a run could not do.

    Writes nothing.
    """
    reason = why_no_documents(model)
    loaders = {"train_loader": data.train, "eval_loader": data.held_out}
    loaders |= {f"eval_loaders.{label}": rows for label, rows in data.labelled.items()}
    for name, rows in loaders.items():
        if isinstance(rows, PackedDocuments | PackedHeldOut) and reason is not None:
            raise ConfigError(f"{name}.name is 'finetuning', and {reason}")
    check_trackers(config.loggers)
    for callback in callbacks:
        callback.check(config, model, data)


def softly(what: str, call: Callable[[], object]) -> None:
    """Call what follows the last step. The run is trained and saved, so an error is a warning."""
    try:
        call()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        log.warning(
            "%s failed after the last step (%s: %s); the run is trained and saved",
            what,
            type(error).__name__,
            reason,
        )


class _Loop:
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
        self.clock = Clock(position.batch)
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
        return self._finish()

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
        # Step
        began = time.perf_counter()
        flags = (run.stop_requests.by_signal, self.writer.failed)
        result, (self.stop_agreed, self.save_failed) = train_step(run.setup, run.batch, flags)
        if isinstance(result, Skipped):
            raise_if_too_many_skipped(run, result)
            skipped = run.position.skipped_in_a_row + 1
            run.position = replace(run.position, batch=run.batch + 1, skipped_in_a_row=skipped)
            record = skipped_record(run.batch, result)
        else:
            run.position = replace(run.position, batch=run.batch + 1, skipped_in_a_row=0)
            seconds = time.perf_counter() - began
            remaining = self.clock.remaining(run.batch, run.setup.batches)
            record = train_record(run.setup, run.batch, result, seconds, remaining)
        run.metrics.write(record)
        progress.show(record)
        # Evaluate, report, save
        scored = run.finished or run.due(self.config.eval_interval)
        if scored:
            self._evaluate(progress)
        for callback in self.callbacks:
            if isinstance(result, Skipped):
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

    def _finish(self) -> RunResult:
        run = self.run
        folder = run.setup.folder
        # Fail if the last checkpoint is missing or damaged.
        verify(folder / f"ba{run.batch}")
        records = run.metrics.read()
        if is_rank0():
            # Imported here: matplotlib takes a second that only the end of a run needs.
            from tokenyard_train.records.plots import expert_heatmap, loss_curve

            softly("loss.png", lambda: loss_curve(records, folder / "loss.png"))
            softly("experts.png", lambda: expert_heatmap(records, folder / "experts.png"))
            softly("the summary", lambda: summarize(run, records))
        for callback in self.callbacks:
            softly(type(callback).__name__, partial(callback.end, run))
        losses = [r["loss"] for r in records if r["kind"] == "train"]
        scores = [r["bits_per_byte"] for r in records if r["kind"] == "eval"]
        return RunResult(
            folder=folder,
            batches=run.batch,
            train_loss=losses[-1] if losses else math.nan,
            bits_per_byte=scores[-1] if scores else None,
        )
