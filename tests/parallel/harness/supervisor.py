"""Runs under `tokenyard launch` whose ranks are killed or stopped, and what each fault costs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

POLL = 0.005  # seconds
MAX_DELAY = {"kill": 0.1, "kill while saving": 0.02, "stop": 0.1}
"""Kinds of faults, and the most seconds between their batch and the signal."""


class Fault(NamedTuple):
    """A signal to one rank."""

    kind: str  # a key of MAX_DELAY
    rank: int
    batch: int  # steps done before it
    delay: float = 0.0  # seconds after that step


class Recovery(NamedTuple):
    """What a fault cost."""

    detected: float  # seconds until the supervisor reported it
    recovered: float  # seconds until the run was as far as before
    redone: int  # steps
    message: str  # the line of the supervisor


class SupervisedRun:
    """`tokenyard launch` and its ranks."""

    def __init__(self, settings: dict[str, Any], nproc: int, *options: str):
        self.folder = Path(settings["save_folder"])
        path = self.folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "tokenyard_train", "launch", "--nproc", str(nproc)]
        self.process = subprocess.Popen(
            [*command, *options, str(path)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []  # of stderr, with their time
        threading.Thread(target=self._read_stderr, daemon=True).start()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def restarts(self) -> list[tuple[float, str]]:
        return [(at, line) for at, line in list(self.lines) if "; restart " in line]

    def text(self) -> str:
        return "\n".join(line for _, line in list(self.lines))

    def pids(self) -> dict[int, int]:
        """Return the process ids by rank; ranks that have ended are absent."""
        pids = {}
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            for pid in children.read_text().split():
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        pids[int(entry[5:])] = int(pid)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended while it was read
        return pids

    def steps(self) -> int:
        """Return the number of steps in the run's metrics."""
        try:
            return (self.folder / "metrics.jsonl").read_text().count('"kind": "train"')
        except FileNotFoundError:  # not yet written, or set aside by a run that starts anew
            return 0

    def saved(self) -> int:
        """Return the batch of the newest checkpoint."""
        manifests = self.folder.glob("ba*/manifest.json")
        return max((int(path.parent.name[2:]) for path in manifests), default=0)

    def is_saving(self) -> bool:
        return any(self.folder.glob(".unfinished-*"))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Poll a condition; return False if the supervisor ends first, or the time is over."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(POLL)
        return True

    def inject(self, fault: Fault) -> Recovery:
        """Send the fault's signal, and wait until the run is as far as it was."""
        assert self.wait_for(lambda: self.steps() >= fault.batch), self.text()
        if fault.kind == "kill while saving":
            assert self.wait_for(self.is_saving), self.text()
        time.sleep(fault.delay)
        restarts = len(self.restarts)
        pid = self.pids()[fault.rank]
        sent = time.monotonic()
        os.kill(pid, signal.SIGSTOP if fault.kind == "stop" else signal.SIGKILL)
        assert self.wait_for(lambda: len(self.restarts) > restarts), self.text()
        detected, message = self.restarts[restarts]
        steps = self.steps()
        redone = steps - self.saved()
        # the metrics of the next start are cut back to the checkpoint first
        assert self.wait_for(lambda: bool(self.pids()) and self.steps() != steps), self.text()
        assert self.wait_for(lambda: self.steps() >= steps or self.process.poll() is not None)
        return Recovery(detected - sent, time.monotonic() - sent, redone, message)


def draw_faults(seed: int, kinds: list[str], ranks: int, batches: int) -> list[Fault]:
    """Draw one fault of each kind, in order of time, on random ranks at random moments."""
    draw = random.Random(seed)
    moments = sorted(draw.sample(range(2, batches - 3), len(kinds)))
    kinds = list(kinds)
    draw.shuffle(kinds)
    return [
        Fault(kind, draw.randrange(ranks), batch, draw.random() * MAX_DELAY[kind])
        for kind, batch in zip(kinds, moments)
    ]
