"""What the processes of a run do together: one of them decides, writes files and speaks, and all go on alike."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tokenyard import TokenyardError


def started_processes() -> int:
    """Return how many processes torchrun (or whoever sets WORLD_SIZE) started for this run; 1 outside of it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Say whether this is the process that writes files and speaks; it is where there is only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first(call: Callable[[], Any], group: Any = None) -> Any:
    """Call on the first process only; every process gets what it returned, which JSON must hold.

    A TokenyardError of the first process is raised on every one, so that all end with the same sentence and none waits
    for another. They speak over `group`, by default that of all.
    """
    if started_processes() == 1:
        return call()
    answer = _answer(call) if is_first() else None
    kind, value = _broadcast(answer, group)
    if kind == "error":
        raise TokenyardError(value)
    return value


def group_of_writers() -> Any:
    """Return a group of all processes for tensors on the CPU, to use beside a training step; None if there is one."""
    return dist.new_group(backend="gloo") if started_processes() > 1 else None


def part() -> None:
    """Leave the other processes, when the work is done; nothing happens where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _answer(call: Callable[[], Any]) -> list[Any]:
    try:
        return ["value", call()]
    except TokenyardError as error:
        return ["error", str(error)]


def _broadcast(answer: list[Any] | None, group: Any) -> list[Any]:
    """Send the first process's JSON to the others; its length goes ahead."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    text = json.dumps(answer).encode() if answer is not None else b""
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, 0, group)
    body = torch.tensor(list(text), dtype=torch.uint8, device=device)
    if not is_first():
        body = torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    dist.broadcast(body, 0, group)
    received: list[Any] = json.loads(bytes(body.tolist()))
    return received
