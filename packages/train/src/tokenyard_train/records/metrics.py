"""The metrics file of a run: metrics.jsonl, one JSON object per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tokenyard import TokenyardError
from tokenyard_train.records.trackers import Trackers

TIMINGS = ("seconds", "tokens_per_s", "flops_per_s")
"""Record keys that differ between two runs of the same config."""


class Metrics:
    """The metrics file of a run, and the trackers that receive the same records."""

    def __init__(self, path: Path):
        self.path = path
        self.trackers = Trackers({})

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and pass it to the trackers.

        Raises TokenyardError if the file cannot be written, for example on a full disk.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TokenyardError(f"{self.path} cannot be written: {error.strerror}") from None
        self.trackers.record(record)

    def read(self) -> list[dict[str, Any]]:
        """Return all records."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def size(self) -> int:
        """Return the file's size in bytes. A checkpoint stores it, see `rewind`."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, size: int) -> None:
        """Truncate the file to the size that it had when a checkpoint was saved."""
        if self.size() > size:
            os.truncate(self.path, size)


class NullMetrics(Metrics):
    """Metrics of a rank that writes no files. Keeps the last record of each kind in memory."""

    def __init__(self, path: Path):
        super().__init__(path)
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
