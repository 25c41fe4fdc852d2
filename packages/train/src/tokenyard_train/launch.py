"""Starting the processes of a run on this machine, and starting them again when one of them fails.

A supervisor of our own, and not torchrun's, because a restart takes a fresh port: processes that meet again at an old
one may find what is left of the last attempt.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tokenyard_train.stopping import STOPPED

_MISTAKE = 2  # of the config or the machine: another attempt would end alike
_POLL = 0.05  # seconds
_GRACE = 5.0  # seconds that the others have, when one has failed, to say what they saw


def launch(config: Path, overrides: Sequence[str], nproc: int, max_restarts: int) -> int:
    """Train by `nproc` processes; return the exit code: 0, 2 for a mistake, 75 if stopped by SIGTERM, else 1.

    Processes meet on the loopback. When one fails, the others are killed, and all start anew from the last good
    checkpoint, up to `max_restarts` times. SIGTERM and SIGINT are passed on, so that the run saves and stops.
    """
    for attempt in range(max_restarts + 1):
        processes = Processes(config, [*overrides, *(["autoresume=true"] if attempt else [])], nproc)
        code = processes.wait()
        if code in (0, _MISTAKE, STOPPED) or processes.asked:
            return code
        left = max_restarts - attempt
        print(f"{processes.fault}; restarts left: {left}", file=sys.stderr, flush=True)
    return 1


class Processes:
    """One attempt: the processes of a run, and what became of them."""

    def __init__(self, config: Path, overrides: Sequence[str], nproc: int):
        port = _free_port()
        command = [sys.executable, "-m", "tokenyard_train", "train", str(config), *overrides]
        self.running = {rank: subprocess.Popen(command, env=_environment(rank, nproc, port)) for rank in range(nproc)}
        self.asked, self.fault = False, ""

    def wait(self) -> int:
        """Wait until all have ended, or one has failed; leave none running. Return the exit code of the attempt."""
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._watch()
        finally:
            for process in self.running.values():
                process.kill()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self) -> int:
        codes: dict[int, int] = {}
        deadline = float("inf")
        while len(codes) < len(self.running) and time.monotonic() < deadline:
            for rank, process in self.running.items():
                code = process.poll()
                if code is None or rank in codes:
                    continue
                codes[rank] = code
                if code:
                    deadline = min(deadline, time.monotonic() + _GRACE)
            time.sleep(_POLL)
        return self._judge({rank: code for rank, code in codes.items() if code})

    def _judge(self, failures: dict[int, int]) -> int:
        """Name the process that failed, one that was killed before those that missed it; return its exit code."""
        if not failures:
            return 0
        rank, code = min(failures.items(), key=lambda failure: failure[1] > 0)
        self.fault = f"process {rank} ended by {_named(code)}"
        return code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // nproc)}
    return os.environ | {name: str(value) for name, value in (ranks | where | threads).items()}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
