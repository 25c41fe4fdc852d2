"""Private names of torch that this package uses; a test calls each function.

Each function names the torch versions that have the private name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


def set_timeout(group: Any, timeout: timedelta) -> None:
    """Set how long a collective of a process group may take (gloo and NCCL only).

    torch 2.10 to 2.13; 2.14 has a public function. `init_device_mesh` always gives its groups the
    default of half an hour.
    """
    if dist.get_backend(group) in ("gloo", "nccl"):
        public = getattr(dist, "set_timeout", None)
        (public or distributed_c10d._set_pg_timeout)(timeout, group)


def init_fake_world(ranks: int) -> None:
    """Initialize the default process group as rank 0 of `ranks` ranks that do not exist.

    torch 2.10 to 2.13. Importing the module registers the backend "fake".
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def begin_all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Any:
    """Start to send `sent[r]` of the rows to each rank r; return the rows [sum(received), ...].

    Only `end_all_to_all` may read them. It is an operator with a result, so selective recompute can
    keep the result, which ``dist.all_to_all_single`` writes into an argument. torch 2.10 to 2.13.
    """
    return torch.ops._c10d_functional.all_to_all_single(
        rows.contiguous(), list(received), list(sent), group.group_name
    )


def end_all_to_all(rows: Tensor) -> Any:
    """Wait for rows that `begin_all_to_all` returned: on a GPU the stream waits, not the host.

    torch 2.10 to 2.13.
    """
    return torch.ops._c10d_functional.wait_tensor(rows)


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended. torch 2.10 to 2.13.

    FSDP uses the same queue.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)  # type: ignore[attr-defined]


def all_gather(gathered: Tensor, own: Tensor, group: Any) -> None:
    """Gather a tensor [n] of every rank into one [ranks * n].

    torch 2.13 has a new name for it, and warns of the old one.
    """
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(gathered, own, group=group)


def reduce_scatter(total: Tensor, parts: Tensor, group: Any) -> None:
    """Sum a tensor [ranks * n] of every rank, and return this rank's part [n] of the sum.

    torch 2.13 has a new name for it, and warns of the old one.
    """
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(total, parts, group=group)


def held_tensor(parameter: Any) -> Tensor:
    """Return the very tensor that a DTensor holds; `to_local` returns another. torch 2.10 to 2.13.

    FSDP asks this one for its extensions.
    """
    held: Tensor = parameter._local_tensor
    return held
