"""Files that ranks write for the supervisor: that the run started, its timeout, and faults."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from tokenyard_cli.once import FOLDER, is_first
from tokenyard_train.torch_private import default_timeout

_STARTED = "began"
_TIMEOUT = "timeout"
_START_TIMEOUT = 60.0  # seconds that a rank may be stopped before it has joined the others
# They log calls, or dispatch operators: a name such as `redispatch` names no collective.
_WRAPPERS = ("torch.distributed.c10d_logger", "torch._ops", "torch._library")
# gloo's messages: the second one is raised by a call that waited while another call timed out.
_GLOO = ("gloo", "Application timeout caused pair closure")


class Fault(NamedTuple):
    """A collective that failed on one rank."""

    collective: str  # the function, and its caller in tokenyard
    reason: str


def collective_fault(error: BaseException) -> Fault | None:
    """Return the collective that failed because of another rank; None for any other error."""
    from_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in _GLOO)
    if not from_gloo and not isinstance(error, dist.DistError):
        return None
    *callers, (_, function) = _calls(error.__traceback__)
    ours = [f"{module}.{name}" for module, name in callers if module.startswith("tokenyard")]
    return Fault(function + (f", called by {ours[-1]}" if ours else ""), str(error).splitlines()[0])


def exit_with_fault(fault: Fault) -> NoReturn:
    """End this rank with code 1, after telling the supervisor why, or else printing why.

    No thread is waited for: those of other groups may still wait for the rank that is missing.
    """
    rank = int(os.environ.get("RANK", "0"))
    if (folder := os.environ.get(FOLDER)) is not None:
        unfinished = Path(folder, f".{rank}.json")
        unfinished.write_text(json.dumps(fault._asdict()), encoding="utf-8")
        unfinished.rename(_path(Path(folder), rank))
    elif is_first(f"failed in {fault.collective}"):
        sentence = f"error: rank {rank} failed in {fault.collective}: {fault.reason}"
        print(sentence, file=sys.stderr, flush=True)
    os._exit(1)


def read_faults(folder: Path, ranks: int) -> dict[int, Fault]:
    """Return the faults that ranks wrote, by rank."""
    paths = {rank: _path(folder, rank) for rank in range(ranks)}
    return {
        rank: Fault(**json.loads(path.read_text(encoding="utf-8")))
        for rank, path in paths.items()
        if path.exists()
    }


def _path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def write_timeout() -> None:
    """Record the timeout of a collective in seconds, if there are several ranks."""
    if (folder := os.environ.get(FOLDER)) is not None:
        seconds = default_timeout().total_seconds() if dist.is_initialized() else math.inf
        unfinished = Path(folder, f".{_TIMEOUT}{os.environ.get('RANK', '0')}")
        unfinished.write_text(str(seconds), encoding="ascii")
        unfinished.rename(Path(folder, _TIMEOUT))


def mark_started() -> None:
    """Record that the run owns its folder, so that another attempt resumes in it."""
    if (folder := os.environ.get(FOLDER)) is not None:
        Path(folder, _STARTED).touch()


def has_started(folder: Path) -> bool:
    """Return whether an attempt reached `mark_started`."""
    return (folder / _STARTED).exists()


def read_timeout(folder: Path) -> float:
    """Return the seconds that a collective may take; a minute until a rank has written them."""
    path = folder / _TIMEOUT
    return float(path.read_text(encoding="ascii")) if path.exists() else _START_TIMEOUT


def _calls(trace: TracebackType | None) -> list[tuple[str, str]]:
    """Return (module, function) of each frame, innermost last, without torch's wrappers."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    calls = [(str(frame.f_globals.get("__name__", "")), frame.f_code.co_name) for frame in frames]
    return [(module, function) for module, function in calls if not module.startswith(_WRAPPERS)]
