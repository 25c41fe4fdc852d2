"""A whole run: build it, check it, and train."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.console import Console

from tokenyard import ConfigError, Model, why_no_documents
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data, PackedDocuments, PackedHeldOut
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.deterministic import deterministic
from tokenyard_train.engine.finish import RunResult
from tokenyard_train.engine.folder import run_folder
from tokenyard_train.engine.loop import Loop
from tokenyard_train.engine.out_of_memory import out_of_memory_is_a_mistake
from tokenyard_train.engine.setup import build_setup
from tokenyard_train.launch.faults import mark_started
from tokenyard_train.records.trackers import check_trackers


def run_training(config: TrainConfig, console: Console, callbacks: Sequence[Callback]) -> RunResult:
    """Train by a resolved config. The caller builds the callbacks that the config names.

    Raises TokenyardError for a mistake in the config.
    """
    with deterministic(config.deterministic), out_of_memory_is_a_mistake(config):
        setup = build_setup(config, console, partial(check_run, config, callbacks))
        # The folder is made last, after everything that may fail before it.
        with run_folder(config):
            mark_started()
            return Loop(setup, callbacks).train_with_trackers()


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
