"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from tokenyard_train.config.loggers import TensorboardLogger
from tokenyard_train.optional import needs
from tokenyard_train.records.trackers._build import Place


class TensorboardTracker:
    """Writes an event file; a resumed run hides the steps that it redoes.

    It stands in ``tensorboard`` in the run's folder, or in a folder of `log_dir` that is named after the run.
    """

    def __init__(self, options: TensorboardLogger, place: Place):
        needs("tensorboard", "loggers.tensorboard", "tokenyard-train[tensorboard]")
        from torch.utils.tensorboard import SummaryWriter

        folder = (
            Path(options.log_dir) / place.run_name
            if options.log_dir
            else place.folder / "tensorboard"
        )
        self._writer = SummaryWriter(
            str(folder), purge_step=place.batch + 1 if place.batch else None
        )
        self._every, self._logged = options.flush_interval, 0
        if not place.batch:
            self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(dict(place.config))}\n```")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers; flush after every `flush_interval` records."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._logged += 1
        if self._logged % self._every == 0:
            self._writer.flush()

    def finish(self, failed: bool) -> None:
        """Flush and close the file."""
        self._writer.close()
