"""One signal to a run under `tokenyard launch`, at a random moment, and what it leaves behind."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harness.supervisor import SupervisedRun

KINDS = (
    "SIGINT",
    "SIGTERM",
    "SIGHUP",
    "kill a rank",
    "stop and kill a rank",
    "kill the supervisor",
)
MOMENTS = ("start", "batch", "batch", "saving")
WITHIN = 10.0
"""Seconds after the end of the supervisor in which every process and port is gone."""


class Disturbance(NamedTuple):
    """A signal, and when it is sent."""

    kind: str  # one of KINDS
    rank: int
    moment: str  # one of MOMENTS
    batch: int  # steps done before it, unless the moment is "start"
    delay: float  # seconds after that


def draw_disturbance(seed: int, nproc: int, batches: int) -> Disturbance:
    """Draw a signal; the kinds take turns."""
    draw = random.Random(seed)
    moment = draw.choice(MOMENTS)
    longest = {"start": 4.0, "batch": 0.1, "saving": 0.02}[moment]
    return Disturbance(
        KINDS[seed % len(KINDS)],
        draw.randrange(nproc),
        moment,
        draw.randrange(1, batches - 2),
        draw.random() * longest,
    )


def disturb(run: SupervisedRun, disturbance: Disturbance) -> None:
    """Wait for the moment, and send the signal. The run may end before."""
    if disturbance.moment != "start":
        run.wait_for(lambda: run.steps() >= disturbance.batch)
    if disturbance.moment == "saving":
        run.wait_for(run.is_saving)
    time.sleep(disturbance.delay)
    if not disturbance.kind.endswith("rank"):
        name = "SIGKILL" if disturbance.kind == "kill the supervisor" else disturbance.kind
        if run.process.poll() is None:
            run.process.send_signal(signal.Signals[name])
        return
    run.wait_for(lambda: disturbance.rank in run.pids())
    pid = run.pids().get(disturbance.rank)
    if pid is None:
        return
    if disturbance.kind.startswith("stop"):
        _send(pid, signal.SIGSTOP)
        time.sleep(0.2)
    _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it ended while it was chosen
        os.kill(pid, number)


def remains(mark: str, seconds: float = WITHIN) -> list[str]:
    """Return the command lines of processes with a mark in their environment, after some time.

    A port is open as long as its process lives.
    """
    deadline = time.monotonic() + seconds
    while (found := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _marked(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").iterdir():
        try:
            if not path.name.isdecimal() or mark.encode() not in (path / "environ").read_bytes():
                continue
            found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended, or belongs to another user
    return found
