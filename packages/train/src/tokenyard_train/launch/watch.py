"""Notice a collective over NCCL that does not end, and name it.

NCCL's watchdog fires after the same time. But then it dumps for a minute, prints the frames of its
stack, and names neither the group nor the rank that is missing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import torch.distributed as dist

from tokenyard_train.launch.faults import Fault, exit_with_fault
from tokenyard_train.torch_private import default_timeout, flight_record, set_nccl_timeouts

_POLL = 0.1  # seconds
_PAUSE = 1.0  # seconds between two reads of the record, which take the host some milliseconds
_SPARE = timedelta(minutes=1)
"""NCCL's own timeouts are longer by this. They remain for a rank whose threads cannot run."""


class Waiting(NamedTuple):
    """A collective that has not ended."""

    name: str  # such as "all_reduce 57 of the group mesh_shard"
    seconds: float  # since the host called it


@contextmanager
def watch_collectives(position: Callable[[], object], folder: Path) -> Iterator[None]:
    """Context: end this process with one sentence if an NCCL collective exceeds its timeout.

    `position` changes with every step, so that the record of collectives is read only if a step
    takes longer than the timeout. The stacks of all threads and the record go to a file in
    `folder`. Does nothing for other backends, whose collectives raise an error.
    """
    if not dist.is_initialized() or dist.get_backend() != "nccl" or dist.get_world_size() == 1:
        yield
        return
    timeout = default_timeout()
    set_nccl_timeouts(timeout + _SPARE)
    ended = Event()
    arguments = (position, timeout.total_seconds(), folder, ended)
    Thread(target=watch, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        set_nccl_timeouts(timeout)


def watch(position: Callable[[], object], timeout: float, folder: Path, ended: Event) -> None:
    """Poll until `ended` is set. If a collective takes `timeout` seconds, end this process."""
    before = position()
    since = time.monotonic()
    while not ended.wait(_POLL):
        if (now := position()) != before:
            before = now
            since = time.monotonic()
        if time.monotonic() - since < timeout:
            continue
        waiting = oldest(flight_record())
        if waiting is not None and waiting.seconds >= timeout:
            reason = f"it did not end in {timeout:g} seconds; {_write_stacks(folder)}"
            exit_with_fault(Fault(waiting.name, reason))
        remaining = _PAUSE if waiting is None else timeout - waiting.seconds
        ended.wait(min(remaining, _PAUSE))


def oldest(record: str) -> Waiting | None:
    """Return the oldest collective of torch's record that has not ended, or None."""
    entries = [
        entry
        for entry in json.loads(record).get("entries", ())
        if not entry["retired"] and entry["state"] != "completed"
    ]
    if not entries:
        return None
    entry = min(entries, key=lambda entry: int(entry["time_created_ns"]))
    function = entry["profiling_name"].rpartition(":")[2]
    number, group = entry["collective_seq_id"], entry["process_group"][1]
    seconds = (time.time_ns() - entry["time_created_ns"]) / 1e9
    return Waiting(f"{function} {number} of the group {group}", seconds)


def _write_stacks(folder: Path) -> str:
    """Write the stacks and the record to a file. Return where they are, or why they are not."""
    path = folder / f"fault-rank{os.environ.get('RANK', '0')}.txt"
    try:
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
            file.write(f"\n{flight_record()}\n")
    except OSError as error:  # such as a full disk; the rank must end all the same
        return f"the stacks could not be written ({error})"
    return f"the stacks are in {path}"
