"""Process groups: join the ranks of a run, or act as one of ranks that do not exist."""

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

from tokenyard import ConfigError
from tokenyard.processes import disable_multicast, started_processes
from tokenyard_parallel._torch_private import init_fake_world

LOOPBACK = "127.0.0.1"

_START_TIMEOUT = timedelta(minutes=5)
"""How long ranks wait for each other at the start; a slow start is not a hang."""


def connect(device: torch.device, timeout: timedelta | None = None) -> None:
    """Initialize the default process group: gloo on CPUs, NCCL on GPUs.

    Does nothing if it is initialized. Outside of torchrun the world size is 1. `timeout` is how
    long a collective may take before it fails. Raises ConfigError if there is no GPU for NCCL.
    """
    if dist.is_initialized():
        return
    disable_multicast()
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"parallel.strategy is for ranks on {device}, and torch finds no CUDA GPU here; "
                "`tokenyard check --nproc N` plans for the GPUs of another machine"
            )
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if started_processes() == 1 and "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif os.environ.get("MASTER_ADDR") == LOOPBACK and "TORCHELASTIC_RUN_ID" not in os.environ:
        store = _loopback_store(timeout)  # all ranks have connected to it by now
        rank = int(os.environ["RANK"])
        world_size = started_processes()
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    else:
        dist.init_process_group(backend, timeout=timeout)


def _loopback_store(timeout: timedelta | None) -> Any:
    """Return a rendezvous store on the loopback; torch's own listens on every interface."""
    is_server = os.environ["RANK"] == "0"
    port = int(os.environ["MASTER_PORT"])
    # the store closes the socket
    listener = socket.create_server((LOOPBACK, port)).detach() if is_server else None
    store_timeout = max(timeout or _START_TIMEOUT, _START_TIMEOUT)
    return TCPStore(
        LOOPBACK, port, started_processes(), is_server, store_timeout, master_listen_fd=listener
    )


@contextmanager
def fake_world(count: int) -> Iterator[None]:
    """Context: act as rank 0 of `count` ranks that do not exist, to plan a layout over them.

    Collectives do nothing, and their results are undefined. The model must stay on the meta device.
    """
    init_fake_world(count)
    try:
        yield
    finally:
        dist.destroy_process_group()
