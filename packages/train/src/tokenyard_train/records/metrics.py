"""The metrics file of a run: metrics.jsonl, one JSON object per line."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from tokenyard import TokenyardError
from tokenyard.bounded import require_plain
from tokenyard_train.records.json_lines import from_line, to_line
from tokenyard_train.records.trackers import Trackers

log = logging.getLogger("tokenyard")

TIMINGS = ("seconds", "tokens_per_s", "flops_per_s", "remaining_s", "peak_bytes")
"""Record keys that differ between two runs of the same config."""


class Metrics:
    """The metrics file of a run, and the trackers that receive the same records.

    Raises ConfigError if the path is a pipe or a device.
    """

    def __init__(self, path: Path):
        require_plain(path)
        self.path = path
        self.trackers = Trackers({})

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and pass it to the trackers. JSON has no nan or inf: they become text.

        Raises TokenyardError if the file cannot be written, for example on a full disk.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_line(record) + "\n")
        except OSError as error:
            raise TokenyardError(f"{self.path} cannot be written: {error.strerror}") from None
        self.trackers.record(record)

    def read(self) -> list[dict[str, Any]]:
        """Return all records. Damaged lines are left out; `rewind` names them."""
        if not self.path.exists():
            return []
        records = map(from_line, self.path.read_bytes().splitlines())
        return [record for record in records if record is not None]

    def size(self) -> int:
        """Return the file's size in bytes. A checkpoint stores it, see `rewind`."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, size: int) -> None:
        """Truncate the file to the size that it had when a checkpoint was saved.

        Logs a warning if it is shorter, or has damaged lines.
        """
        have = self.size()
        if have > size:
            os.truncate(self.path, size)
        elif have < size:
            log.warning(
                "%s has %d bytes, and the checkpoint was saved with %d: records of earlier steps "
                "are lost, and the curves begin later",
                *(self.path, have, size),
            )
        if have == 0:
            return
        content = self.path.read_bytes()
        lines = enumerate(content.splitlines(), 1)
        if damaged := [number for number, line in lines if from_line(line) is None]:
            log.warning("%s: line %d is damaged and is left out", self.path, damaged[0])
        if content and not content.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def set_aside(self) -> None:
        """Rename the file of a run that has no checkpoint, with a warning. The next run is new."""
        if self.size() == 0:
            return
        kept = self.path.with_name(f"{self.path.stem}.old{self.path.suffix}")
        self.path.replace(kept)
        log.warning(
            "no checkpoint in %s: starting anew at batch 0; the metrics of the earlier run are "
            "kept as %s",
            *(self.path.parent, kept.name),
        )


class NullMetrics(Metrics):
    """Metrics of a rank that writes no files. Keeps the last record of each kind in memory."""

    def __init__(self, path: Path):
        self.path = path  # not `super().__init__`, which looks at the file
        self.trackers = Trackers({})
        self.last: dict[str, dict[str, Any]] = {}

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record, in place of the last one of its kind."""
        self.last[record["kind"]] = record

    def read(self) -> list[dict[str, Any]]:
        """Return the last record of each kind."""
        return list(self.last.values())

    def size(self) -> int:
        """Return 0, since there is no file."""
        return 0

    def rewind(self, size: int) -> None:
        """Do nothing, since there is no file."""
