"""Train a model from a config."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from tokenyard_train.callbacks import Callback, build_callbacks, build_registration
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.finish import RunResult
from tokenyard_train.engine.run_training import run_training


def train(config: TrainConfig, console: Console, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Train by a resolved config. The given callbacks run after the config's callbacks.

    Raises TokenyardError for a mistake in the config, before anything is written.
    """
    built = [*build_callbacks(config.callbacks), *build_registration(config.loggers)]
    return run_training(config, console, [*built, *callbacks])
