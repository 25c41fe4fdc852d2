"""What a process says when it fails in a collective, so that whoever supervises it can tell who kept it waiting."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

FOLDER = "TOKENYARD_FAULTS"
"""The environment variable that names a folder for notes of faults, one file a rank."""

_OURS, _TORCHS, _LOGGED = "tokenyard", "torch.distributed.", "torch.distributed.c10d_logger"


class Fault(NamedTuple):
    """A failed collective of one process."""

    collective: str  # the function, and where it was called
    reason: str


def fault_of(error: BaseException) -> Fault | None:
    """Return the collective that an exception came from; None if it came from elsewhere."""
    calls = _calls(error.__traceback__)
    if not isinstance(error, RuntimeError) or not calls:
        return None
    module, function = calls[-1]
    if not module.startswith(_TORCHS) and "all_to_all" not in function:  # an exchange waits for what it began before
        return None
    ours = [f"{module}.{function}" for module, function in calls if module.startswith(_OURS)]
    return Fault(function + (f", called by {ours[-1]}" if ours else ""), str(error).splitlines()[0])


def note(fault: Fault, rank: int) -> None:
    """Leave a note for the supervisor, if there is one."""
    if (folder := os.environ.get(FOLDER)) is not None:
        Path(folder, f"{rank}.json").write_text(json.dumps(fault._asdict()), encoding="utf-8")


def noted(folder: Path, rank: int) -> Fault | None:
    """Return the note that a process left."""
    path = folder / f"{rank}.json"
    return Fault(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _calls(trace: TracebackType | None) -> list[tuple[str, str]]:
    """Return modules and functions, the innermost last, without the wrapper that torch logs collectives with."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    named = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
    return [(module, function) for module, function in named if module != _LOGGED]
