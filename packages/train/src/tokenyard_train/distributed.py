"""What the processes of a run do together: one of them decides, writes files and speaks, and all go on alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from tokenyard import TokenyardError, started_processes

log = logging.getLogger("tokenyard")


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
    _raise(kind, value)
    return value


def share_out(call: Callable[[Any], Any], items: Sequence[Any], group: Any = None) -> list[Any]:
    """Call on each item, on one process each; every process gets all that was returned, which JSON must hold, in order.

    `items` are the same everywhere. A TokenyardError of some process, the first by rank, is raised on every one.
    """
    if started_processes() == 1:
        return [call(item) for item in items]
    rank, world = dist.get_rank(), started_processes()
    answers = _gathered(_answer(lambda: [call(item) for item in items[rank::world]]), group)
    for kind, value in answers:
        _raise(kind, value)
    return [answers[i % world][1][i // world] for i in range(len(items))]


def as_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return the first process's tensor, on every one; the others' are of the same shape and dtype."""
    if dist.is_initialized() and started_processes() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def group_of_writers() -> Any:
    """Return a group of all processes for tensors on the CPU, to use beside a training step; None if there is one."""
    if started_processes() == 1:
        return None
    group = dist.new_group(backend="gloo")
    _set_pg_timeout(_timeout_of_all(), group)  # torch's own default is half an hour
    return group


def part() -> None:
    """Leave the other processes, when the work is done; nothing happens where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _timeout_of_all() -> timedelta:
    """Return how long a collective of all processes may take."""
    world = dist.group.WORLD
    assert world is not None
    timeout: timedelta = world._get_backend(torch.device(_device(world))).options._timeout
    return timeout


def _raise(kind: str, sentence: Any) -> None:
    """Raise on every rank what one of them raised: a mistake of the user as such, anything else as a failure."""
    if kind == "error":
        raise TokenyardError(sentence)
    if kind == "failure":
        raise RuntimeError(sentence)


def _answer(call: Callable[[], Any]) -> list[Any]:
    """Return what a call returned or raised; no exception of one rank may leave the others waiting."""
    try:
        return ["value", call()]
    except (TokenyardError, OSError) as error:
        return ["error", str(error)]
    except Exception as error:
        log.error("rank %d failed", dist.get_rank(), exc_info=error)
        return ["failure", f"rank {dist.get_rank()} failed: {error!r}"]


def _broadcast(answer: list[Any] | None, group: Any) -> list[Any]:
    """Send the first process's JSON to the others; its length goes ahead."""
    body = (
        _bytes(answer, group)
        if answer is not None
        else torch.empty(0, dtype=torch.uint8, device=_device(group))
    )
    length = torch.tensor([body.numel()], device=body.device)
    dist.broadcast(length, 0, group)
    if not is_first():
        body = body.new_empty(int(length.item()))
    dist.broadcast(body, 0, group)
    received: list[Any] = json.loads(bytes(body.tolist()))
    return received


def _gathered(answer: list[Any], group: Any) -> list[list[Any]]:
    """Return every process's JSON, by rank; their lengths go ahead, and all are filled up to the longest."""
    body = _bytes(answer, group)
    length = torch.tensor([body.numel()], device=body.device)
    lengths = [torch.empty_like(length) for _ in range(started_processes())]
    dist.all_gather(lengths, length, group)
    longest = int(max(lengths))
    bodies = [body.new_empty(longest) for _ in lengths]
    dist.all_gather(bodies, torch.cat((body, body.new_zeros(longest - body.numel()))), group)
    return [json.loads(bytes(b[: int(size)].tolist())) for b, size in zip(bodies, lengths)]


def _bytes(answer: list[Any], group: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(answer).encode()), dtype=torch.uint8, device=_device(group))


def _device(group: Any) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
