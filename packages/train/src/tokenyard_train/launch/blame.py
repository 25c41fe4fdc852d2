"""Find the rank that made an attempt fail."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenyard_train.launch.faults import Fault, read_fault


def explain_failure(codes: Mapping[int, int], notes: Path, pids: Sequence[int]) -> tuple[str, int]:
    """Return a sentence and an exit code for an attempt; ("", 0) if all ranks succeeded.

    `codes` maps each rank that ended to its exit code, in order of completion. `pids` are those of
    all ranks. A rank is not the cause if it only waited for another one in a collective: it wrote a
    fault file to `notes`, or NCCL aborted it after its timeout.
    """
    failed = {rank: code for rank, code in codes.items() if code}
    faults = {rank: read_fault(notes, rank) for rank in failed}
    for rank, code in failed.items():
        if faults[rank] is None and code != -signal.SIGABRT:
            return f"process {rank} ended by {_describe_code(code)}", code
    if not failed:
        return "", 0
    rank = next((rank for rank, fault in faults.items() if fault is not None), next(iter(failed)))
    running = [other for other in range(len(pids)) if other not in codes]
    collective = _describe_collective(faults[rank])
    if running:
        return f"{_describe_hanging(running, pids)}: process {rank} waited {collective}", 1
    return f"process {rank} failed {collective}", 1


def _describe_collective(fault: Fault | None) -> str:
    return "in a collective" if fault is None else f"in {fault.collective} ({fault.reason})"


def _describe_hanging(ranks: Sequence[int], pids: Sequence[int]) -> str:
    """Name the ranks that still run. If some are stopped, the others may wait for those."""
    stopped = [rank for rank in ranks if _is_stopped(pids[rank])]
    names = " and ".join(f"process {rank} hangs" for rank in stopped or ranks)
    if not stopped:
        return names
    return f"{names} (it is stopped)" if len(stopped) == 1 else f"{names} (stopped)"


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal; False on systems without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _describe_code(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
