"""Describe the machine of a measurement."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("torch", "triton", "transformers", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return device, processor, threads, versions and time as plain JSON values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": _versions(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that affect speed, and of tokenyard's distributions."""
    versions = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {
        name: versions[name]
        for name in sorted(versions)
        if name in _LIBRARIES or name.startswith("tokenyard")
    }
