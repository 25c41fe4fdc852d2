"""The processes of a run, as far as everybody has to know of them."""

from __future__ import annotations

import os

import torch.distributed as dist


def started_processes() -> int:
    """Return how many processes torchrun (or whoever sets WORLD_SIZE) started for this run; 1 outside of it."""
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )
