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
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from tokenyard_train.faults import FOLDER, noted
from tokenyard_train.stopping import STOPPED

_MISTAKE = 2  # of the config or the machine: another attempt would end alike
_POLL = 0.05  # seconds
_GRACE = 1.0  # seconds that the others have, after one has ended, to end too


def launch(config: Path, overrides: Sequence[str], nproc: int, max_restarts: int) -> int:
    """Train by `nproc` processes; return the exit code: 0, 2 for a mistake, 75 if stopped by SIGTERM, else 1.

    Processes meet on the loopback. When one fails or hangs, the others are killed, and all start anew from the last
    good checkpoint, up to `max_restarts` times. SIGTERM and SIGINT are passed on, so that the run saves and stops.
    """
    train = [sys.executable, "-m", "tokenyard_train", "train", str(config), *overrides]
    return supervise(lambda again: [*train, "autoresume=true"] if again else train, nproc, max_restarts)


def supervise(command: Callable[[bool], Sequence[str]], nproc: int, max_restarts: int) -> int:
    """Start `nproc` processes of a command, which may differ when it is started again; see `launch`."""
    for restart in range(max_restarts + 1):
        with tempfile.TemporaryDirectory() as notes:
            attempt = Attempt(command(restart > 0), nproc, Path(notes))
            code = attempt.wait()
        if code in (0, _MISTAKE, STOPPED) or attempt.asked:
            return code
        then = f"restart {restart + 1} of {max_restarts}" if restart < max_restarts else "no restart is left"
        print(f"{attempt.fault}; {then}", file=sys.stderr, flush=True)
    return 1


class Attempt:
    """The processes of a run, started together, and what became of them."""

    def __init__(self, command: Sequence[str], nproc: int, notes: Path):
        port = _free_port()
        environments = [_environment(rank, nproc, port) | {FOLDER: str(notes)} for rank in range(nproc)]
        self.processes = [  # a terminal's Ctrl-C is for the supervisor, which asks them to stop
            subprocess.Popen(command, env=environment, start_new_session=True) for environment in environments
        ]
        self.notes, self.asked, self.fault = notes, False, ""

    def wait(self) -> int:
        """Wait until all have ended, or one has failed; leave none running. Return the exit code of the attempt."""
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            codes = self._watch()
            self.fault, code = self._judge(codes)
            return code
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self) -> dict[int, int]:
        """Return the exit codes by rank in the order of ending, without those that did not end."""
        codes: dict[int, int] = {}
        deadline = float("inf")
        while len(codes) < len(self.processes) and time.monotonic() < deadline:
            for rank, process in enumerate(self.processes):
                if rank not in codes and (code := process.poll()) is not None:
                    codes[rank] = code
                    deadline = deadline if code in (0, STOPPED) else time.monotonic() + _GRACE
            time.sleep(_POLL)
        return codes

    def _judge(self, codes: dict[int, int]) -> tuple[str, int]:
        """Say who is to blame, with its exit code: not those that only missed another in a collective."""
        failed = {rank: code for rank, code in codes.items() if code}
        missed = {rank: fault for rank in failed if (fault := noted(self.notes, rank)) is not None}
        hanging = [rank for rank in range(len(self.processes)) if rank not in codes]
        if not failed:
            return "", 0
        for rank, code in failed.items():
            if rank not in missed and code != -signal.SIGABRT:  # NCCL aborts a process that waited too long
                return f"process {rank} ended by {_named(code)}", code
        rank, fault = next(iter(missed.items()), (next(iter(failed)), None))
        where = f"in {fault.collective} ({fault.reason})" if fault is not None else "in a collective"
        if hanging:
            who = " and ".join(f"process {other} {_state(self.processes[other].pid)}" for other in hanging)
            return f"{who}: process {rank} waited {where}", 1
        return f"process {rank} failed {where}", 1

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    interface = "lo" if sys.platform == "linux" else "lo0"
    unless_given = {
        "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // nproc),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    given = {name: str(value) for name, value in (ranks | where).items()}
    return {name: str(value) for name, value in unless_given.items()} | dict(os.environ) | given


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _state(pid: int) -> str:
    """Say what a process that did not end is doing, as far as the system tells."""
    try:
        stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        stopped = False
    return "hangs (it is stopped)" if stopped else "hangs"
