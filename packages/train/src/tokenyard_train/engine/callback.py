"""The base class of callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenyard_train.engine.setup import Run


class Callback:
    """Something to do at certain moments of a run; a subclass overrides those that it cares for.

    Each process of a run calls its own, so what changes the run (`run.batches`, say) must be decided alike by all.

    Given to ``train(config, console, callbacks=[...])``, or offered by an installed distribution: an entry point of the
    group ``tokenyard.callbacks`` is called with the options that a config gives under ``callbacks``.
    """

    def start(self, run: Run) -> None:
        """Act before the first step of a run that is not resumed."""

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after a step, with its record, and after the evaluation if one was due."""

    def skipped(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after a step that was not taken since its loss or gradient was not finite, with its record."""

    def evaluated(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after an evaluation, with its record."""

    def saved(self, run: Run, checkpoint: Path) -> None:
        """Act after a checkpoint was saved."""

    def end(self, run: Run) -> None:
        """Act after the last step, when everything is saved."""
