"""Ranks that a signal keeps stopped while others run.

A rank that computes notices a stopped one only in its next collective, and waits there for the
timeout. That may be long after: an evaluation or a text that is generated has few collectives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

_MOST = 1.0  # seconds between two looks that count; the supervisor may have been stopped, too


class StoppedRanks:
    """Adds up how long each rank has been stopped, while another one ran or had ended."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # by stopped rank
        self._before = time.monotonic()

    def look(self, pids: Mapping[int, int], ended: bool) -> None:
        """Look at the processes of the ranks that have not ended. `ended` is whether any has.

        A job is suspended if all of its ranks are stopped. Ranks that are stopped after another one
        has ended may never run again.
        """
        now = time.monotonic()
        passed = min(now - self._before, _MOST)
        self._before = now
        stopped = [rank for rank, pid in pids.items() if is_stopped(pid)]
        if not ended and len(stopped) == len(pids):
            stopped = []
        self.seconds = {rank: self.seconds.get(rank, 0.0) + passed for rank in stopped}

    def longer_than(self, seconds: float) -> list[int]:
        """Return the ranks that have been stopped for longer."""
        return [rank for rank, passed in self.seconds.items() if passed > seconds]


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal; False on systems without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
