"""Training from a config: build, then step, evaluate, save and report until the duration is reached."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from tokenyard_train.checkpoint import CheckpointError, verify
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.distributed import is_first
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.deterministic import deterministic
from tokenyard_train.engine.evaluate import evaluate
from tokenyard_train.engine.nonfinite import NonFiniteError, Skipped
from tokenyard_train.engine.progress import Progress
from tokenyard_train.engine.resume import resume, save, start_from
from tokenyard_train.engine.setup import Run, build_run
from tokenyard_train.engine.signals import Stopped, stopping
from tokenyard_train.engine.step import train_step
from tokenyard_train.engine.step_records import skipped_record, train_record
from tokenyard_train.engine.summary import announce, summarize
from tokenyard_train.records.trackers import build_trackers


class RunResult(NamedTuple):
    """What a finished run leaves."""

    folder: Path
    batches: int
    train_loss: float  # of the last step that was taken, nats per token; nan if none was
    bits_per_byte: float | None  # of the held-out text


def run_training(config: TrainConfig, console: Console, callbacks: Sequence[Callback]) -> RunResult:
    """Train as a resolved config says, but for its callbacks: with those given.

    Raises TokenyardError for a mistake in the config, before anything is written.
    """
    with deterministic(config.deterministic):
        return _train(config, console, callbacks)


def _train(config: TrainConfig, console: Console, callbacks: Sequence[Callback]) -> RunResult:
    run = build_run(config, console)
    run.batch = resume(run)
    if run.batch == 0 and config.load_path is not None:
        start_from(run, config.load_path)
    settings = config.model_dump(mode="json")
    if is_first():
        run.metrics.trackers = build_trackers(
            config.loggers, run.folder, config.run_name, settings, run.batch
        )
    failed = True
    try:
        announce(run)
        _start(run, callbacks)
        with Progress(run) as progress, stopping(run):
            while run.batch < run.batches and not run.stop:
                _one_batch(run, callbacks, progress)
        if run.batch < run.batches:
            raise Stopped(
                f"stopped as asked, after batch {run.batch} of {run.batches}, which is saved in {run.folder}"
            )
        result = _finish(run, callbacks)
        failed = False
        return result
    except NonFiniteError as error:  # on all ranks alike, so all can wait for what is being saved
        with suppress(CheckpointError):  # which would hide why the run ends
            _finish_saving(run, callbacks)
        raise error
    finally:
        run.metrics.trackers.finish(failed)


def _start(run: Run, callbacks: Sequence[Callback]) -> None:
    if run.batch == 0:
        for callback in callbacks:
            callback.start(run)


def _one_batch(run: Run, callbacks: Sequence[Callback], progress: Progress) -> None:
    began = time.perf_counter()
    result = train_step(run)
    run.batch += 1
    if isinstance(result, Skipped):
        step = skipped_record(run, result)
        run.metrics.write(step)
        progress.skipped(step)
    else:
        step = train_record(run, result, time.perf_counter() - began)
        run.metrics.write(step)
        progress.update(step)
    if run.data.held_out is not None and (
        run.batch == run.batches or run.due(run.config.eval_interval)
    ):
        _evaluate(run, callbacks, progress)
    for callback in callbacks:
        (callback.skipped if isinstance(result, Skipped) else callback.batch_end)(run, step)
    _save(run, callbacks)


def _evaluate(run: Run, callbacks: Sequence[Callback], progress: Progress) -> None:
    record = evaluate(run)
    run.metrics.write(record)
    progress.evaluated(record)
    for callback in callbacks:
        callback.evaluated(run, record)


def _save(run: Run, callbacks: Sequence[Callback]) -> None:
    """Save if that is due after this step; wait for it, unless it is written while training goes on."""
    ends = run.stop or run.batch >= run.batches  # which a callback may have changed
    due = ends or run.due(run.config.save_interval)
    if run.unsaved or due:
        _finish_saving(run, callbacks)
    if due:
        save(run)
    if ends or not run.config.save_async:
        _finish_saving(run, callbacks)


def _finish_saving(run: Run, callbacks: Sequence[Callback]) -> None:
    """Wait for the checkpoint under way, if there is one."""
    if (path := run.saver.finish()) is not None:
        for callback in callbacks:
            callback.saved(run, path)


def _finish(run: Run, callbacks: Sequence[Callback]) -> RunResult:
    verify(run.folder / f"ba{run.batch}")  # the run is called trained only with its result on disk
    records = run.metrics.read()
    if is_first():
        from tokenyard_train.records.plots import (  # a second that only the end of a run needs
            expert_heatmap,
            loss_curve,
        )

        loss_curve(records, run.folder / "loss.png")
        expert_heatmap(records, run.folder / "experts.png")
        summarize(run, records)
    for callback in callbacks:
        callback.end(run)
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    scores = [r["bits_per_byte"] for r in records if r["kind"] == "eval"]
    return RunResult(
        run.folder, run.batch, losses[-1] if losses else math.nan, scores[-1] if scores else None
    )
