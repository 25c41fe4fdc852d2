"""The world size of a run, before and after torch.distributed is initialised."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

_STORE_TIMEOUT = timedelta(seconds=5)


def started_processes() -> int:
    """Return the number of processes of this run: the world size, by default ``WORLD_SIZE`` or 1.

    torchrun and other launchers set ``WORLD_SIZE``.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_in_store(key: str) -> int | None:
    """Count the ranks that have called this with a key; None if torchrun is not the launcher.

    It needs no process group: the store is the one that torchrun keeps for each attempt. Raises
    torch's DistError or RuntimeError if the store is gone.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.TCPStore(*address, is_master=False, timeout=_STORE_TIMEOUT)  # type: ignore[attr-defined]
    return int(store.add(f"tokenyard/{attempt}/{key}", 1))


def disable_multicast() -> None:
    """Disable NVLink multicast in NCCL, symmetric memory and NVSHMEM; variables that are set win.

    A program that fails while it uses multicast can take the GPUs of a host out of service.
    Call this before the first process group.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
