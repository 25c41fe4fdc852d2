"""Files that ranks write for the supervisor: "run started" and "collective failed"."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

from tokenyard_cli.once import FOLDER

_STARTED = "began"
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


def write_fault(fault: Fault, rank: int) -> None:
    """Write the fault file of a rank, if a supervisor set FOLDER."""
    if (folder := os.environ.get(FOLDER)) is not None:
        Path(folder, f"{rank}.json").write_text(json.dumps(fault._asdict()), encoding="utf-8")


def read_fault(folder: Path, rank: int) -> Fault | None:
    """Return the fault that a rank wrote, if any."""
    path = folder / f"{rank}.json"
    return Fault(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def mark_started() -> None:
    """Record that the run owns its folder, so that another attempt resumes in it."""
    if (folder := os.environ.get(FOLDER)) is not None:
        Path(folder, _STARTED).touch()


def has_started(folder: Path) -> bool:
    """Return whether an attempt reached `mark_started`."""
    return (folder / _STARTED).exists()


def _calls(trace: TracebackType | None) -> list[tuple[str, str]]:
    """Return (module, function) of each frame, innermost last, without torch's logging wrapper."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    calls = [(str(frame.f_globals.get("__name__", "")), frame.f_code.co_name) for frame in frames]
    return [
        (module, function)
        for module, function in calls
        if module != "torch.distributed.c10d_logger"
    ]
