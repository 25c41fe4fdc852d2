"""Who is to blame when processes of a run ended and others did not."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenyard_train.launch.faults import Fault, noted_fault


def verdict(codes: Mapping[int, int], notes: Path, pids: Sequence[int]) -> tuple[str, int]:
    """Return a sentence and an exit code for an attempt; ("", 0) if all went well.

    `codes` are those of the ranks that ended, in that order; `pids` those of all. Who only missed another process in a
    collective is not to blame: by its own note, or aborted by NCCL, which waited too long.
    """
    failed = {rank: code for rank, code in codes.items() if code}
    missed = {rank: noted_fault(notes, rank) for rank in failed}
    for rank, code in failed.items():
        if missed[rank] is None and code != -signal.SIGABRT:
            return f"process {rank} ended by {_named(code)}", code
    if not failed:
        return "", 0
    rank = next((rank for rank, fault in missed.items() if fault is not None), next(iter(failed)))
    hanging = [other for other in range(len(pids)) if other not in codes]
    if hanging:
        return f"{_hanging(hanging, pids)}: process {rank} waited {_where(missed[rank])}", 1
    return f"process {rank} failed {_where(missed[rank])}", 1


def _where(fault: Fault | None) -> str:
    return "in a collective" if fault is None else f"in {fault.collective} ({fault.reason})"


def _hanging(ranks: Sequence[int], pids: Sequence[int]) -> str:
    """Name those that do not end; if some were stopped, the others may be waiting for them."""
    stopped = [rank for rank in ranks if _is_stopped(pids[rank])]
    names = [f"process {rank} hangs" for rank in stopped or ranks]
    return " and ".join(names) + (
        " (it is stopped)" if len(stopped) == 1 else " (stopped)" if stopped else ""
    )


def _is_stopped(pid: int) -> bool:
    """Say whether the system says so; where it does not tell, nobody is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
