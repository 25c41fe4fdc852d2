"""The base class of callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenyard import Model
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data
from tokenyard_train.engine.state import Run


class Callback:
    """Code that runs at certain moments of a run. A subclass overrides the methods that it needs.

    Pass callbacks to ``train(config, console, callbacks=[...])``, or offer one from an installed
    distribution: an entry point of the group ``tokenyard.callbacks`` is called with the options
    that a config gives under ``callbacks``.

    Each rank calls its own. ``run.stop_training()`` ends the run after this step; every rank must
    call it after the same step. A GPU waits for `batch_end` and `skipped`: without them, the next
    step is launched before the numbers of a step have arrived.
    """

    def check(self, config: TrainConfig, model: Model, data: Data) -> None:
        """Raise ConfigError for what this callback could not do in such a run.

        Called before anything is written, also by `tokenyard check`. `model` is on the meta device.
        """

    def start(self, run: Run) -> None:
        """Act before the first step of a run. Not called when a run resumes."""

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after a step, with its record, and after the evaluation if one was due."""

    def skipped(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after a step that was skipped because a number was not finite, with its record."""

    def evaluated(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after an evaluation, with its record; its `kind` is eval, or eval/label."""

    def saved(self, run: Run, checkpoint: Path) -> None:
        """Act after a checkpoint was saved. `run.batch` may be past the checkpoint's step."""

    def end(self, run: Run) -> None:
        """Act after the last step, when everything is saved.

        Not called when a run is stopped by a signal, or fails.
        """
