"""Functions that all ranks of a run call together: run on rank 0, map over ranks, broadcast."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tokenyard import TokenyardError, started_processes
from tokenyard_train.torch_private import copy_default_timeout

log = logging.getLogger("tokenyard")


def is_rank0() -> bool:
    """Return whether this is rank 0, which writes files and prints. True in a single process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank0(call: Callable[[], Any], group: Any = None) -> Any:
    """Call a function on rank 0 only and return its result on all ranks.

    The result must be serializable as JSON. `group` defaults to the group of all ranks. An error on
    rank 0 is raised on all ranks: TokenyardError for a user's mistake, else RuntimeError.
    """
    if started_processes() == 1:
        return call()
    outcome = _try(call) if is_rank0() else None
    kind, value = _broadcast_json(outcome, group)
    _raise(kind, value)
    return value


def map_over_ranks(
    call: Callable[[Any], Any], items: Sequence[Any], group: Any = None
) -> list[Any]:
    """Call a function on each item, with the items divided among ranks; return all results.

    `items` must be equal on all ranks. Results are in the order of `items` and must be serializable
    as JSON. The error of the lowest rank that failed is raised on all ranks, see `on_rank0`.
    """
    if started_processes() == 1:
        return [call(item) for item in items]
    rank = dist.get_rank()
    world = started_processes()
    outcomes = _gather_json(_try(lambda: [call(item) for item in items[rank::world]]), group)
    for kind, value in outcomes:
        _raise(kind, value)
    return [outcomes[i % world][1][i // world] for i in range(len(items))]


def broadcast_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite a tensor with rank 0's and return it. Shape and dtype must agree on all ranks."""
    if dist.is_initialized() and started_processes() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def cpu_group() -> Any:
    """Return a new gloo group of all ranks, usable beside a training step; None for one process."""
    if started_processes() == 1:
        return None
    group = dist.new_group(backend="gloo")
    copy_default_timeout(group)
    return group


def leave_group() -> None:
    """Destroy the default process group at the end of the work, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _raise(kind: str, message: Any) -> None:
    """Raise the error of some rank: TokenyardError for a user's mistake, else RuntimeError."""
    if kind == "error":
        raise TokenyardError(message)
    if kind == "failure":
        raise RuntimeError(message)


def _try(call: Callable[[], Any]) -> list[Any]:
    """Return [kind, result or message]. Catches every exception, so that no other rank hangs."""
    try:
        return ["value", call()]
    except (TokenyardError, OSError) as error:
        return ["error", str(error)]
    except Exception as error:
        log.error("rank %d failed", dist.get_rank(), exc_info=error)
        return ["failure", f"rank {dist.get_rank()} failed: {error!r}"]


def _broadcast_json(outcome: list[Any] | None, group: Any) -> list[Any]:
    """Broadcast rank 0's JSON: first its length, then its bytes."""
    if outcome is None:
        body = torch.empty(0, dtype=torch.uint8, device=_device(group))
    else:
        body = _json_bytes(outcome, group)
    length = torch.tensor([body.numel()], device=body.device)
    dist.broadcast(length, 0, group)
    if not is_rank0():
        body = body.new_empty(int(length.item()))
    dist.broadcast(body, 0, group)
    received: list[Any] = json.loads(bytes(body.tolist()))
    return received


def _gather_json(outcome: list[Any], group: Any) -> list[list[Any]]:
    """Gather the JSON of all ranks: first the lengths, then the bytes, padded to the longest."""
    body = _json_bytes(outcome, group)
    length = torch.tensor([body.numel()], device=body.device)
    lengths = [torch.empty_like(length) for _ in range(started_processes())]
    dist.all_gather(lengths, length, group)
    longest = int(max(lengths))
    bodies = [body.new_empty(longest) for _ in lengths]
    dist.all_gather(bodies, torch.cat((body, body.new_zeros(longest - body.numel()))), group)
    return [json.loads(bytes(b[: int(size)].tolist())) for b, size in zip(bodies, lengths)]


def _json_bytes(outcome: list[Any], group: Any) -> torch.Tensor:
    return torch.tensor(
        list(json.dumps(outcome).encode()), dtype=torch.uint8, device=_device(group)
    )


def _device(group: Any) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
