"""Devices by name. A resolved device always names its card: ``cuda:0``, never ``cuda``."""

from __future__ import annotations

import os

import torch

from tokenyard.errors import ConfigError
from tokenyard.processes import started_processes

_CHOICES = "give cpu, cuda, cuda:N or auto"


def resolve_device(name: str | torch.device, key: str = "device") -> torch.device:
    """Return the device that `name` (cpu, cuda, cuda:N or auto) means here, with its index.

    `auto` takes a GPU if there is one. Without an index, a GPU is that of this rank (``LOCAL_RANK``), or torch's
    current one. `key` names the option in the errors. Raises ConfigError for a device that torch does not find.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key} is {name!r}; {_CHOICES}") from None
    wraps = str(device) != str(name)  # cuda:256 is cuda:0 to torch
    if device.type not in ("cpu", "cuda") or wraps or (device.type == "cpu" and device.index):
        raise ConfigError(f"{key} is {str(name)!r}; {_CHOICES}")
    if device.type == "cpu":
        return with_index(device)
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(
            f"{key} is {str(name)!r}, but torch finds no CUDA GPU here; give cpu or auto"
        )
    if device.index is None:
        device = torch.device("cuda", _local_rank(count))
    if device.index >= count:
        gpus = "1 CUDA GPU" if count == 1 else f"{count} CUDA GPUs"
        raise ConfigError(
            f"{key} is {str(device)!r}, but torch finds {gpus} here; count from cuda:0"
        )
    return device


def with_index(device: str | torch.device) -> torch.device:
    """Return a device as its tensors report it: an accelerator with an index, torch's current one; a CPU without."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None or device.type == "meta":
        return device
    if device.type == "cuda":
        return torch.device(
            "cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        )
    return torch.zeros(0, device=device).device


def _local_rank(count: int) -> int:
    """Return the GPU of this rank: that of its number, or the current one where each rank sees only its own."""
    local_rank = os.environ.get("LOCAL_RANK") if started_processes() > 1 else None
    if local_rank is not None and int(local_rank) < count:
        return int(local_rank)
    return with_index("cuda").index or 0
