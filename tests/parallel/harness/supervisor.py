"""Runs under `tokenyard launch` whose processes are killed or stopped, and what became of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import yaml


class Disturbance(NamedTuple):
    """What is done to which process, and when."""

    kind: str  # kill, kill while saving, stop
    rank: int
    batch: int  # steps done before it
    later: float = 0.0  # seconds after that


class Outcome(NamedTuple):
    """What a disturbance cost."""

    detected: float  # seconds until the supervisor said it
    recovered: float  # seconds until the run was as far as before
    redone: int  # steps
    said: str


class Supervised:
    """A supervisor and its processes."""

    def __init__(self, settings: dict, nproc: int, *options: str):
        self.folder = Path(settings["save_folder"])
        path = self.folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(settings))
        command = [
            sys.executable,
            "-m",
            "tokenyard_train",
            "launch",
            "--nproc",
            str(nproc),
            *options,
            str(path),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.said: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stderr:
            self.said.append((time.monotonic(), line.rstrip()))

    @property
    def restarts(self) -> list[tuple[float, str]]:
        return [(at, line) for at, line in list(self.said) if "; restart " in line]

    def text(self) -> str:
        return "\n".join(line for _, line in list(self.said))

    def ranks(self) -> dict[int, int]:
        """Return the process ids by rank."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {}
        for pid in path.read_text().split() if path.exists() else ():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {
                int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")
            }
        return found

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count('"kind": "train"') if path.exists() else 0

    def saved(self) -> int:
        """Return the batch of the newest checkpoint."""
        return max(
            (int(p.name[2:]) for p in self.folder.glob("ba*") if (p / "manifest.json").exists()),
            default=0,
        )

    def saving(self) -> bool:
        return any(self.folder.glob(".unfinished-*"))

    def wait_for(self, condition, seconds: float = 120) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def disturb(self, what: Disturbance) -> Outcome:
        """Do it, and wait until the run is as far as it was."""
        assert self.wait_for(lambda: self.steps() >= what.batch), self.text()
        if what.kind == "kill while saving":
            assert self.wait_for(self.saving), self.text()
        time.sleep(what.later)
        known, victim = len(self.restarts), self.ranks()[what.rank]
        began = time.monotonic()
        os.kill(victim, signal.SIGSTOP if what.kind == "stop" else signal.SIGKILL)
        assert self.wait_for(lambda: len(self.restarts) > known), self.text()
        detected, said = self.restarts[known]
        done, saved = self.steps(), self.saved()
        assert self.wait_for(lambda: self.ranks().keys() and self.steps() != done), self.text()
        assert self.wait_for(lambda: self.steps() >= done or self.process.poll() is not None), (
            self.text()
        )
        return Outcome(detected - began, time.monotonic() - began, done - saved, said)


def drawn(seed: int, kinds: list[str], ranks: int, batches: int) -> list[Disturbance]:
    """Draw disturbances of these kinds, in order of time, on random ranks at random moments."""
    draw = random.Random(seed)
    at = sorted(draw.sample(range(2, batches - 3), len(kinds)))
    draw.shuffle(kinds)
    within = {"kill while saving": 0.02}  # seconds
    return [
        Disturbance(kind, draw.randrange(ranks), batch, draw.random() * within.get(kind, 0.1))
        for kind, batch in zip(kinds, at)
    ]
