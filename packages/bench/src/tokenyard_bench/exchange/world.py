"""The ranks of a run: meet, agree on failures, and combine times."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard import ConfigError
from tokenyard.processes import disable_multicast, started_processes

_TEXT = 256  # bytes of a rank's message


def join_ranks(device: torch.device, timeout: float) -> World:
    """Initialize the process group that torchrun describes: gloo on CPUs, NCCL on GPUs.

    `timeout` is how long an entrant's collective may take, in seconds. Uses the default group if
    there is one. Raises ConfigError for fewer than two ranks, or fewer GPUs than ranks.
    """
    if started_processes() < 2:
        raise ConfigError(
            "tokenyard bench exchange needs at least 2 ranks, and 1 was started; "
            "run torchrun --nproc-per-node 2 -m tokenyard_bench exchange"
        )
    gpu = device.type == "cuda"
    if gpu:
        _check_gpus()
    if not dist.is_initialized():
        disable_multicast()
        # A rank that fails waits here until the collectives of the others have timed out.
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            timeout=timedelta(seconds=2 * timeout + 60),
            device_id=device if gpu else None,
        )
    return World(device, timeout)


def _check_gpus() -> None:
    """Raise ConfigError if ranks of this machine would share a GPU, which NCCL does not support."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    # With this variable, each rank may see another GPU.
    if ranks > gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:
        raise ConfigError(
            f"{ranks} ranks on this machine need as many GPUs, and torch finds {gpus}; "
            "start fewer, or give --device cpu"
        )


class World:
    """All ranks. Entrants communicate in a group of their own, `group`."""

    def __init__(self, device: torch.device, timeout: float):
        self.device = device
        self.timeout = timeout
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.renew_group()

    def renew_group(self) -> None:
        """Replace the entrants' group, in which a collective may have failed."""
        self.group: Any = dist.new_group(timeout=timedelta(seconds=self.timeout))

    def meet(self, pause: float = 0.0) -> None:
        """Wait until the device is idle, then `pause` seconds, then for all ranks."""
        self._synchronize()
        time.sleep(pause)
        dist.all_reduce(torch.ones(1, device=self.device))
        self._synchronize()

    def agree(self, fault: str | None) -> str | None:
        """Return the first fault of any rank, or None. Every rank calls this.

        Names the rank unless all ranks have the same fault. Later faults may be timeouts of
        collectives that the first one missed.
        """
        (times,) = zip(*self.gather([time.time() if fault else math.inf]))
        code = (fault or "").encode()[:_TEXT]
        text = torch.tensor(list(code.ljust(_TEXT, b"\0")), dtype=torch.uint8, device=self.device)
        codes = [bytes(other.tolist()).rstrip(b"\0") for other in self._gather(text)]
        faults = [code.decode(errors="ignore") for code in codes]
        if not any(faults):
            return None
        first = times.index(min(times))
        return faults[0] if len(set(faults)) == 1 else f"rank {first}: {faults[first]}"

    def largest(self, samples: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the largest of all ranks, element by element."""
        values = torch.tensor(samples, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        largest: list[list[float]] = values.tolist()
        return largest

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of each rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [other.tolist() for other in self._gather(mine)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor)
        return tensors

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
