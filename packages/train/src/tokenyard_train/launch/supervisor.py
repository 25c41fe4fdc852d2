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
from contextlib import suppress
from pathlib import Path
from types import FrameType

from tokenyard_train.launch.blame import verdict
from tokenyard_train.launch.exit_codes import MISTAKE, STOPPED
from tokenyard_train.launch.faults import FOLDER, noted_began
from tokenyard_train.launch.signals import handling

_POLL = 0.05  # seconds
_GRACE = 1.0  # seconds that the others have, after one has ended, to end too


def launch(config: Path, overrides: Sequence[str], nproc: int, max_restarts: int) -> int:
    """Train by `nproc` processes; return the exit code: 0, 2 for a mistake, 75 if stopped as asked, else 1.

    Processes meet on the loopback. When one fails or hangs, the others are killed, and all start anew from the last
    good checkpoint, up to `max_restarts` times. SIGTERM, SIGINT and SIGHUP are passed on, so that the run saves and
    stops.
    """
    train = [sys.executable, "-m", "tokenyard_train", "train", str(config), *overrides]
    return supervise(
        lambda began: [*train, "autoresume=true"] if began else train, nproc, max_restarts
    )


def supervise(command: Callable[[bool], Sequence[str]], nproc: int, max_restarts: int) -> int:
    """Start `nproc` processes of a command, which may differ once the run began; see `launch`."""
    began = False
    for restart in range(max_restarts + 1):
        with tempfile.TemporaryDirectory() as notes:
            attempt = Attempt(command(began), nproc, Path(notes))
            code = attempt.run()
            began = began or noted_began(Path(notes))
        if code in (0, MISTAKE, STOPPED):
            return code
        if attempt.asked:
            return STOPPED
        then = (
            f"restart {restart + 1} of {max_restarts}"
            if restart < max_restarts
            else "no restart is left"
        )
        print(f"{attempt.fault}; {then}", file=sys.stderr, flush=True)
    return 1


class Attempt:
    """The processes of a run, started together, and what became of them."""

    def __init__(self, command: Sequence[str], nproc: int, notes: Path):
        self.command, self.nproc, self.notes = command, nproc, notes
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked, self.fault = False, ""

    def run(self) -> int:
        """Start them, wait until all have ended or one has failed, and leave none; return the attempt's exit code."""
        with handling(self._pass_on):
            try:
                self._start()
                self.fault, code = verdict(
                    self._watch(), self.notes, [process.pid for process in self.processes]
                )
                return code
            finally:
                for process in self.processes:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)  # and what it has started itself
                    process.wait()

    def _start(self) -> None:
        port = _free_port()
        for rank in range(self.nproc):
            environment = _environment(rank, self.nproc, port) | {FOLDER: str(self.notes)}
            # a session of its own: a terminal's Ctrl-C is for the supervisor, which asks them to stop
            self.processes.append(
                subprocess.Popen(self.command, env=environment, start_new_session=True)
            )

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
