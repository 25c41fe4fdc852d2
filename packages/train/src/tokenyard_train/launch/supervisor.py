"""Start the ranks of a run on this machine, and restart all of them when one fails.

Unlike torchrun's supervisor, a restart uses a new port. On the old port, ranks may connect to
leftovers of the last attempt.
"""

from __future__ import annotations

import math
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
from typing import Self

from tokenyard_cli.exit import MISTAKE, STOPPED
from tokenyard_cli.once import FOLDER
from tokenyard_train.launch.blame import explain_failure
from tokenyard_train.launch.faults import has_started, read_faults, read_timeout
from tokenyard_train.launch.signals import signal_handler
from tokenyard_train.launch.stopped import StoppedRanks
from tokenyard_train.parent_death import PARENT

_POLL = 0.05  # seconds
_GRACE = 1.0  # seconds for the other ranks to end after one has failed
_SPARE = 1.0  # seconds more than the timeout, in which a rank may say what it waited in
_SAME_REQUEST = 0.5  # seconds in which further signals count as the first one
_KILLED = "killed at the second request to stop, before the step was saved"


def launch(config: Path, overrides: Sequence[str], nproc: int, max_restarts: int) -> int:
    """Train with `nproc` ranks on the loopback interface, restarting them after a failure.

    When a rank fails or hangs, the others are killed. All ranks then restart from the last good
    checkpoint, at most `max_restarts` times. SIGTERM, SIGINT and SIGHUP are forwarded to the ranks,
    so that the run saves and stops. Returns the exit code: 0, 2 for a mistake, 75 if stopped by a
    signal, else 1. A second signal kills all ranks at once. If the supervisor is killed, its ranks
    die with it.
    """
    train = [sys.executable, "-m", "tokenyard_train", "train", str(config), *overrides]
    return supervise(
        lambda started: [*train, "autoresume=true"] if started else train, nproc, max_restarts
    )


def supervise(command: Callable[[bool], Sequence[str]], nproc: int, max_restarts: int) -> int:
    """Run `nproc` ranks of a command, see `launch`. `command` receives whether the run started."""
    started = False
    for restart in range(max_restarts + 1):
        with tempfile.TemporaryDirectory() as notes:
            with Attempt(command(started), nproc, Path(notes)) as attempt:
                code = attempt.run()
                if attempt.killed:
                    print(f"{_KILLED}; the last checkpoint is kept", file=sys.stderr, flush=True)
                    return 1
                if code in (0, MISTAKE, STOPPED):
                    return code
                if attempt.stop_requested:
                    if code != -signal.SIGTERM:  # else a rank died of the request, before its start
                        failure = f"{attempt.failure}; no restart after a request to stop"
                        print(failure, file=sys.stderr, flush=True)
                    return STOPPED
                remaining = f"restart {restart + 1} of {max_restarts}"
                action = remaining if restart < max_restarts else "no restart is left"
                # Before the ranks are killed, which takes a second on a GPU
                print(f"{attempt.failure}; {action}", file=sys.stderr, flush=True)
            started = started or has_started(Path(notes))
    return 1


class Attempt:
    """The ranks of a run, started together. A context that kills those that still run at its end.

    In the context, signals are forwarded to the ranks.
    """

    def __init__(self, command: Sequence[str], nproc: int, notes: Path):
        self.command = command
        self.nproc = nproc
        self.notes = notes
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stop_requested = False
        self.requested_at = 0.0  # seconds, of time.monotonic
        self.killed = False  # by a second request
        self.failure = ""

    def __enter__(self) -> Self:
        self._signals = signal_handler(self._forward)
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also kills its children
        for process in self.processes:
            process.wait()
        self._signals.__exit__(None, None, None)

    def run(self) -> int:
        """Start the ranks and wait until all have ended or one has failed; return an exit code."""
        self._start()
        pids = [process.pid for process in self.processes]
        codes, stopped = self._wait(pids)
        self.failure, code = explain_failure(codes, self.notes, pids, stopped)
        return code

    def _start(self) -> None:
        port = _free_port()
        for rank in range(self.nproc):
            environment = _environment(rank, self.nproc, port) | {FOLDER: str(self.notes)}
            # A new session keeps a terminal's Ctrl-C from the rank. The supervisor forwards it.
            self.processes.append(
                subprocess.Popen(self.command, env=environment, start_new_session=True)
            )
        if self.stop_requested:  # the request came before the last of them could hear it
            self._terminate()

    def _wait(self, pids: Sequence[int]) -> tuple[dict[int, int], list[int]]:
        """Return exit codes by rank, in order of completion; running ranks are absent.

        Also return the ranks that were stopped for longer than a collective may take.
        """
        codes: dict[int, int] = {}
        failed = False
        deadline = math.inf
        looks = StoppedRanks()
        stopped: list[int] = []
        while len(codes) < len(self.processes) and time.monotonic() < deadline and not self.killed:
            for rank, process in enumerate(self.processes):
                if rank not in codes and (code := process.poll()) is not None:
                    codes[rank] = code
                    failed = failed or code not in (0, STOPPED)
            # A rank that uses a GPU takes a while to end after it wrote its fault file.
            if deadline == math.inf and (failed or read_faults(self.notes, self.nproc)):
                deadline = time.monotonic() + _GRACE
            running = {rank: pid for rank, pid in enumerate(pids) if rank not in codes}
            looks.look(running, ended=bool(codes))
            if stopped := looks.longer_than(read_timeout(self.notes) + _SPARE):
                break
            time.sleep(_POLL)
        return codes, stopped

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Request every rank to stop. A second signal kills the ranks at once."""
        now = time.monotonic()
        if self.stop_requested and now - self.requested_at > _SAME_REQUEST:
            self.killed = True
        elif not self.stop_requested:
            self.stop_requested = True
            self.requested_at = now
            self._terminate()

    def _terminate(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Return the environment of a rank. Users may override the defaults, but not the layout."""
    interface = "lo" if sys.platform == "linux" else "lo0"
    defaults = {
        "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // nproc),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    layout = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        PARENT: os.getpid(),
    }
    return {name: str(value) for name, value in (defaults | os.environ | layout).items()}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
