"""What of a config does not depend on how a run is laid out over processes."""

from __future__ import annotations

from typing import Any


def layout_free(config: dict[str, Any]) -> dict[str, Any]:
    """Return a dumped config without the layout it asks for, wherever a model's own config keeps a part of it."""
    return config | {"parallel": {}, "model": _without_ranks(config["model"])}


def _without_ranks(model: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in model.items() if key != "moe_world_size"}
    return {
        key: _without_ranks(value) if isinstance(value, dict) else value
        for key, value in kept.items()
    }
