"""What the processes of a run leave for whoever supervises them: that the run began, and whom a collective missed."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

FOLDER = "TOKENYARD_NOTES"
"""The environment variable that names the folder for them."""

_BEGAN = "began"
_GLOO = (
    "gloo",
    "Application timeout caused pair closure",
)  # as it says of what waited beside a call that timed out


class Fault(NamedTuple):
    """A failed collective of one process."""

    collective: str  # the function, and where it was called
    reason: str


def fault_of(error: BaseException) -> Fault | None:
    """Return the collective in which an exception missed another process; None if it has another cause."""
    of_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in _GLOO)
    if not of_gloo and not isinstance(error, dist.DistError):
        return None
    *callers, (_, function) = _calls(error.__traceback__)
    ours = [f"{module}.{name}" for module, name in callers if module.startswith("tokenyard")]
    return Fault(function + (f", called by {ours[-1]}" if ours else ""), str(error).splitlines()[0])


def note_fault(fault: Fault, rank: int) -> None:
    """Leave a note of a fault."""
    if (folder := os.environ.get(FOLDER)) is not None:
        Path(folder, f"{rank}.json").write_text(json.dumps(fault._asdict()), encoding="utf-8")


def noted_fault(folder: Path, rank: int) -> Fault | None:
    """Return the fault that a process noted."""
    path = folder / f"{rank}.json"
    return Fault(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def note_began() -> None:
    """Leave a note that the run's folder is this run's now, so that another attempt goes on in it."""
    if (folder := os.environ.get(FOLDER)) is not None:
        Path(folder, _BEGAN).touch()


def noted_began(folder: Path) -> bool:
    """Say whether an attempt came so far."""
    return (folder / _BEGAN).exists()


def _calls(trace: TracebackType | None) -> list[tuple[str, str]]:
    """Return modules and functions, the innermost last, without the wrapper that torch logs collectives with."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    named = [(str(frame.f_globals.get("__name__", "")), frame.f_code.co_name) for frame in frames]
    return [
        (module, function)
        for module, function in named
        if module != "torch.distributed.c10d_logger"
    ]
