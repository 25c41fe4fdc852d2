"""The processes of a run: how many there are, and joining them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tokenyard import started_processes

_NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""NVLink's multicast stays off unless the environment asks for it: a program that fails while it uses multicast can
take a host's GPUs out of service."""

LOOPBACK = "127.0.0.1"

_TO_START = timedelta(minutes=5)
"""How long processes wait for each other to start, which is no hang yet."""


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
    if started_processes() == 1 and "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif os.environ.get("MASTER_ADDR") == LOOPBACK and "TORCHELASTIC_RUN_ID" not in os.environ:
        store, rank = _loopback_store(timeout), int(os.environ["RANK"])  # all are here now
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=started_processes(), timeout=timeout
        )
    else:
        dist.init_process_group(backend, timeout=timeout)


def _loopback_store(timeout: timedelta | None) -> Any:
    """Return the store where processes of one machine meet; torch's own would listen to the whole network."""
    first, port = os.environ["RANK"] == "0", int(os.environ["MASTER_PORT"])
    listener = (
        socket.create_server((LOOPBACK, port)).detach() if first else None
    )  # the store closes it
    patience = max(timeout or _TO_START, _TO_START)
    return TCPStore(LOOPBACK, port, started_processes(), first, patience, master_listen_fd=listener)


@contextmanager
def imagine(count: int) -> Iterator[None]:
    """Meanwhile, be the first of so many processes that do not exist, to see how a model would lie over them.

    Collectives do nothing and give nothing sensible; the model must stay on the meta device.
    """
    from torch.testing._internal.distributed.fake_pg import (
        FakeStore,
    )  # importing it registers the backend "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
