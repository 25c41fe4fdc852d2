"""Weights & Biases tracker, offline by default."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tokenyard_train.config.loggers import WandbLogger
from tokenyard_train.optional import require
from tokenyard_train.records.trackers._build import RunInfo

_START = 20  # seconds in which a server must answer


def _timeout() -> dict[str, int]:
    """Wait 20 seconds for a server that is gone, not 90, unless the user has set the time."""
    return {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": _START}


class WandbTracker:
    """Logs to a W&B run, which keeps its id when the run is resumed.

    Offline runs are written to the run's folder under ``wandb``; upload them with ``wandb sync``.
    """

    def __init__(self, options: WandbLogger, run: RunInfo):
        wandb = require("wandb", "loggers.wandb", "tokenyard-train[wandb]")
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            name=options.name or run.run_name,
            tags=options.tags,
            id=run.identities.get("wandb"),
            resume="allow" if "wandb" in run.identities and options.mode == "online" else None,
            mode=options.mode,
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, **_timeout()),
        )
        run.identities["wandb"] = self._run.id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers."""
        self._run.log(dict(numbers), step=step)

    def finish(self, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=1 if failed else 0)
