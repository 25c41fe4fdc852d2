"""The processes of a run: how many there are, and joining them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink's multicast stays off unless the environment asks for it: a program that fails while it uses multicast can
take a host's GPUs out of service."""


def started_processes() -> int:
    """Return how many processes torchrun (or whoever sets WORLD_SIZE) started for this run; 1 outside of it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def connect(device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the processes of this run, by gloo on CPUs and NCCL on GPUs; nothing happens if they are joined already.

    Outside of torchrun this process is alone. `timeout` is how long a collective may take before it fails.
    """
    if dist.is_initialized():
        return
    for name, value in _NO_MULTICAST.items():
        os.environ.setdefault(name, value)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if started_processes() > 1 or "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]


@contextmanager
def imagine(count: int) -> Iterator[None]:
    """Meanwhile, be the first of so many processes that do not exist, to see how a model would lie over them.

    Collectives do nothing and give nothing sensible; the model must stay on the meta device.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
