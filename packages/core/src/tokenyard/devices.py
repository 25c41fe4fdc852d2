"""Device names. A resolved GPU always has an index: ``cuda:0``, never ``cuda``."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tokenyard.errors import ConfigError
from tokenyard.processes import started_processes

_CHOICES = "give cpu, cuda, cuda:N or auto"


def resolve_device(
    name: str | torch.device, key: str = "device", planned: bool = False
) -> torch.device:
    """Return the device for `name` (cpu, cuda, cuda:N or auto), with an index if it is a GPU.

    `auto` is a GPU if torch finds one, else the CPU. A GPU without an index becomes the GPU of this
    rank (``LOCAL_RANK``), by default torch's current one. Error messages name the option `key`.
    Raises ConfigError for a device that torch does not find. With `planned`, where nothing is
    computed, a machine without a GPU accepts those of another machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key} is {name!r}; {_CHOICES}") from None
    wraps = str(device) != str(name)  # torch parses cuda:256 as cuda:0
    if device.type not in ("cpu", "cuda") or wraps or (device.type == "cpu" and device.index):
        raise ConfigError(f"{key} is {str(name)!r}; {_CHOICES}")
    if device.type == "cpu":
        return with_index(device)
    count = torch.cuda.device_count()
    if not count and planned:
        return with_index(device)
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
    """Return a device as its tensors report it: a GPU with an index, the CPU without one.

    The default index is that of torch's current device.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None or device.type == "meta":
        return device
    if device.type == "cuda":
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        return torch.device("cuda", index)
    return torch.zeros(0, device=device).device


def _local_rank(count: int) -> int:
    """Return the GPU index of this rank: ``LOCAL_RANK``, by default torch's current device.

    The default also applies if each rank sees only its own GPU.
    """
    local_rank = os.environ.get("LOCAL_RANK") if started_processes() > 1 else None
    if local_rank is not None and int(local_rank) < count:
        return int(local_rank)
    return with_index("cuda").index or 0


def device_memory(device: torch.device | str) -> int | None:
    """Return the total memory of a device in bytes; None if it is not known."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdecimal() else machine


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that torch has held on a GPU since the process began.

    ``torch.cuda.max_memory_allocated`` flattens and sorts all statistics for this one number.
    """
    peak: int = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]
    return peak
