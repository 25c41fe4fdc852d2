"""Find the rank that made an attempt fail."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenyard_train.launch.faults import Fault, read_faults
from tokenyard_train.launch.stopped import is_stopped


def explain_failure(
    codes: Mapping[int, int], notes: Path, pids: Sequence[int], stopped: Sequence[int] = ()
) -> tuple[str, int]:
    """Return a sentence and an exit code for an attempt; ("", 0) if all ranks succeeded.

    `codes` maps each rank that ended to its exit code, in order of completion. `pids` are those of
    all ranks. A rank is not the cause if it only waited for another one in a collective: it wrote a
    fault file to `notes`, or NCCL aborted it after its timeout. `stopped` are the ranks that have
    been stopped for longer than a collective may take, whether or not others wait for them.
    """
    faults = read_faults(notes, len(pids))
    failed = {rank: code for rank, code in codes.items() if code}
    for rank, code in failed.items():
        if rank not in faults and code != -signal.SIGABRT:
            return f"rank {rank} ended by {_describe_code(code)}", code
    waited = [*faults, *(rank for rank in failed if rank not in faults)]
    if not waited:
        return (_describe_stopped(stopped), 1) if stopped else ("", 0)
    running = [rank for rank in range(len(pids)) if rank not in codes and rank not in faults]
    if running:
        return f"{_describe_hanging(running, pids)}: {_describe_waiting(waited[0], faults)}", 1
    if aborted := [rank for rank in failed if rank not in faults]:
        code = codes[aborted[0]]
        return f"rank {aborted[0]} ended by {_describe_code(code)}", code
    return _describe_disagreement(faults), 1


def _describe_disagreement(faults: Mapping[int, Fault]) -> str:
    """Describe ranks that all waited: in different collectives, or in one that failed."""
    first, *others = faults
    collective, reason = faults[first]
    for rank in others:
        if faults[rank].collective != collective:
            return (
                f"ranks {first} and {rank} diverged: rank {first} waited in {collective}, "
                f"and rank {rank} in {faults[rank].collective} ({reason})"
            )
    return f"rank {first} failed in {collective} ({reason})"


def _describe_waiting(rank: int, faults: Mapping[int, Fault]) -> str:
    fault = faults.get(rank)
    if fault is None:
        return f"rank {rank} waited in a collective"
    return f"rank {rank} waited in {fault.collective} ({fault.reason})"


def _describe_hanging(ranks: Sequence[int], pids: Sequence[int]) -> str:
    """Name the ranks that still run. If some are stopped, the others may wait for those."""
    stopped = [rank for rank in ranks if is_stopped(pids[rank])]
    return _describe_stopped(stopped) if stopped else _hangs(ranks)


def _describe_stopped(ranks: Sequence[int]) -> str:
    return f"{_hangs(ranks)} ({'it is stopped' if len(ranks) == 1 else 'stopped'})"


def _hangs(ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {rank} hangs" for rank in ranks)


def _describe_code(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
