"""Several processes on one machine that run functions together, for tests of what needs ranks.

They are started once and serve many cases, since starting them takes longer than most cases.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_START = 120.0  # seconds that the processes have to start and meet


class RanksError(RuntimeError):
    """A rank raised, died, or did not answer in time; what each of them said follows."""


class Ranks:
    """`size` processes in one group, by gloo on the CPU, or by NCCL with a GPU each.

    `timeout` is how many seconds a collective, and a case, may take.
    """

    def __init__(self, size: int, device: str = "cpu", timeout: float = 120.0):
        self.size, self.timeout, self.closed = size, timeout, False
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(size)]
        self._ends = [ours for ours, _ in pipes]
        store = str(Path(self._folder.name) / "store")
        self._processes = [
            context.Process(
                target=_serve, args=(rank, size, device, store, theirs, timeout), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes):
            process.start()
            theirs.close()  # so that its death is heard here
        self._collect(_START)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of a module on every rank; return what each returned. After a RanksError it is closed."""
        code = function.__code__
        for end in self._ends:
            end.send((function.__module__, code.co_filename, function.__name__))
            end.send_bytes(pickle.dumps(args))
        return self._collect(self.timeout + 10)

    def close(self) -> None:
        """Stop the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def _collect(self, seconds: float) -> list[Any]:
        answers = [_answer(end, seconds) for end in self._ends]
        faults = [f"rank {rank}: {said}" for rank, (good, said) in enumerate(answers) if not good]
        if faults:
            self.close()
            self.closed = True
            raise RanksError("\n".join(faults))
        return [said for _, said in answers]


_SHARED: dict[tuple[int, str], Ranks] = {}
"""Processes take seconds to start, so the tests of a session have them in common."""


def ranks(size: int, device: str = "cpu") -> Ranks:
    """Return the processes that all tests of so many ranks share."""
    made = _SHARED.get((size, device))
    if made is None or made.closed:
        made = _SHARED[size, device] = Ranks(size, device)
        atexit.register(made.close)
    return made


def _answer(end: Connection, seconds: float) -> tuple[bool, Any]:
    if not end.poll(seconds):
        return False, f"no answer in {seconds:.0f} s"
    try:
        good, said = end.recv()
    except (EOFError, ConnectionResetError):
        return False, "died"
    return good, said


def _serve(rank: int, size: int, device: str, store: str, end: Connection, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    from tokenyard.processes import disable_multicast

    torch.set_num_threads(1)
    disable_multicast()
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
    end.send((True, None))
    while True:
        try:
            where = end.recv()
        except EOFError:
            return
        try:
            function = _load(*where)
            end.send((True, function(*pickle.loads(end.recv_bytes()))))  # noqa: S301 (our own process sent it)
        except BaseException:
            end.send((False, traceback.format_exc()))


def _load(module: str, path: str, name: str) -> Callable[..., Any]:
    """Return a function of a module, which is imported from its file if it has no place on the path."""
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
