"""TensorBoard tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from tokenyard_train.config.loggers import TensorboardLogger
from tokenyard_train.optional import require
from tokenyard_train.records.trackers._build import RunInfo


class TensorboardTracker:
    """Writes an event file. A run purges the steps that it repeats; a new run purges all.

    The file is in the run's folder under ``tensorboard``, or in ``log_dir/run_name``.
    """

    def __init__(self, options: TensorboardLogger, run: RunInfo):
        require("tensorboard", "loggers.tensorboard", "tokenyard-train[tensorboard]")
        from torch.utils.tensorboard import SummaryWriter

        if options.log_dir:
            folder = Path(options.log_dir) / run.run_name
        else:
            folder = run.folder / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.batch + 1 if run.batch else 0)
        self._flush_interval = options.flush_interval
        self._records = 0
        if not run.batch:
            self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(dict(run.config))}\n```")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers; flush after every `flush_interval` records."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._records += 1
        if self._records % self._flush_interval == 0:
            self._writer.flush()

    def finish(self, failed: bool) -> None:
        """Flush and close the file."""
        self._writer.close()
