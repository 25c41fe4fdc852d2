"""Private names of torch that the exchange uses: torch 2.10 to 2.13."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_DEFAULT = 1800.0  # seconds, that of torch


def group_timeout(group: Any, device: torch.device) -> float:
    """Return how many seconds a collective of a process group may take."""
    if group is None or dist.get_backend(group) == "fake":  # a plan
        return _DEFAULT
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout.total_seconds()


def in_backward() -> bool:
    """Return whether a backward pass runs in this thread. torch's checkpoint asks the same way."""
    task: int = torch._C._current_graph_task_id()
    return task != -1
