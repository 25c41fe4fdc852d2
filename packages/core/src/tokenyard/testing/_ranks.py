"""Local worker processes for tests over several ranks.

Tests share the processes, because starting them takes longer than most tests.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

_START = 120.0  # timeout in seconds for the start of all processes and of their group
_SPARE = 10.0  # seconds in which the error of a collective that timed out arrives
_DUMP = 2.0  # seconds in which a rank writes its stacks


class RanksError(RuntimeError):
    """A rank raised, died, or timed out. The message holds the stacks of each such rank."""


class Ranks:
    """A process group of `size` local processes: gloo on the CPU, or NCCL with one GPU each.

    `timeout` is the limit of a collective and of a call, in seconds.
    """

    def __init__(self, size: int, device: str = "cpu", timeout: float = 120.0):
        self.size = size
        self.timeout = timeout
        self.closed = False
        context = _context()
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(size)]
        self._connections = [parent for parent, _ in pipes]
        store = str(Path(self._folder.name) / "store")
        self._processes = [
            context.Process(
                target=_serve, args=(rank, size, device, store, child, timeout), daemon=True
            )
            for rank, (_, child) in enumerate(pipes)
        ]
        for process, (_, child) in zip(self._processes, pipes):
            process.start()
            child.close()  # so that recv() raises EOFError if the process dies
        self._collect(_START)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a module's function on every rank; return the results by rank.

        Raises RanksError if a rank fails; all processes are then stopped.
        """
        code = function.__code__
        for connection in self._connections:
            connection.send((function.__module__, code.co_filename, function.__name__))
            connection.send_bytes(pickle.dumps(args))
        return self._collect(self.timeout + _SPARE)

    def close(self) -> None:
        """Stop the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def _collect(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        answers = [_receive(connection, deadline) for connection in self._connections]
        for rank, process in enumerate(self._processes):
            if answers[rank] is _NO_ANSWER:
                stacks = _stacks(process.pid, Path(self._folder.name, f"stacks-{rank}"))
                answers[rank] = (False, f"no answer in {seconds:.0f} s\n{stacks}")
        errors = [f"rank {rank}: {error}" for rank, (ok, error) in enumerate(answers) if not ok]
        if errors:
            self.close()
            self.closed = True
            raise RanksError("\n".join(errors))
        return [result for _, result in answers]


_PRELOADED = ["tokenyard.testing._over_ranks", "torch.distributed.fsdp"]


def preload(*modules: str) -> None:
    """Import more modules in the server that ranks are forked from: once, instead of once a rank.

    Call this before the first Ranks of the process. The modules must not start threads or use a
    GPU.
    """
    _PRELOADED.extend(modules)


def _context() -> ForkServerContext | SpawnContext:
    """Return the context that starts ranks: by fork of a server with torch, where that exists."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


_SHARED: dict[tuple[int, str], Ranks] = {}
"""(size, device) -> the processes that all tests of a session share."""


def ranks(size: int, device: str = "cpu") -> Ranks:
    """Return the shared processes for `size` ranks. Starts them if needed."""
    group = _SHARED.get((size, device))
    if group is None or group.closed:
        group = Ranks(size, device)
        _SHARED[size, device] = group
        atexit.register(group.close)
    return group


_NO_ANSWER = (False, None)


def _receive(connection: Connection, deadline: float) -> tuple[bool, Any]:
    """Return (True, result) or (False, error) of one rank, or after the deadline no answer."""
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        return _NO_ANSWER
    try:
        ok, result = connection.recv()
    except (EOFError, ConnectionResetError):
        return False, "died"
    return ok, result


def _stacks(pid: int | None, path: Path) -> str:
    """Return the Python stacks of all threads of a rank, which it writes to `path` at a signal."""
    if pid is None or not path.exists():
        return ""
    os.kill(pid, signal.SIGUSR1)
    time.sleep(_DUMP)
    return path.read_text(encoding="utf-8", errors="replace")


def _serve(
    rank: int, size: int, device: str, store: str, connection: Connection, timeout: float
) -> None:
    """Join the process group, then run the functions that the parent sends until it closes."""
    import torch
    import torch.distributed as dist

    from tokenyard.processes import disable_multicast

    torch.set_num_threads(1)
    disable_multicast()
    if hasattr(faulthandler, "register"):  # not on Windows
        stacks = Path(store).with_name(f"stacks-{rank}").open("w")
        faulthandler.register(signal.SIGUSR1, stacks)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("LOCAL_RANK", str(rank))
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    connection.send((True, None))
    while True:
        try:
            location = connection.recv()
        except EOFError:
            return
        try:
            function = _load(*location)
            args = pickle.loads(connection.recv_bytes())  # noqa: S301 (from our parent process)
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _load(module: str, path: str, name: str) -> Callable[..., Any]:
    """Return a function of a module. Imports the file `path` if the module cannot be found."""
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError:
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
    function: Callable[..., Any] = getattr(sys.modules[module], name)
    return function
