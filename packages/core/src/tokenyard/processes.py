"""The world size of a run, before and after torch.distributed is initialised."""

from __future__ import annotations

import os

import torch.distributed as dist


def started_processes() -> int:
    """Return the number of processes of this run: the world size, by default ``WORLD_SIZE`` or 1.

    torchrun and other launchers set ``WORLD_SIZE``.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))
