"""Remove parallelism from a config, so that configs of different layouts can be compared."""

from __future__ import annotations

from typing import Any


def comparable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a dumped config without its parallelism keys, at any depth of `model` too."""
    return config | {"parallel": {}, "model": _without_ranks(config["model"])}


def _without_ranks(model: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in model.items() if key != "moe_world_size"}
    return {
        key: _without_ranks(value) if isinstance(value, dict) else value
        for key, value in kept.items()
    }
