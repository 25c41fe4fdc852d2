"""Translate the callbacks: those whose numbers every run records are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenyard_train.config.foundry import LEFT_OUT, RECORDED
from tokenyard_train.config.translate.change import Change


def translate_callbacks(config: Mapping[str, Any], changes: list[Change]) -> dict[str, Any]:
    """Return a config without the callbacks that only report what metrics.jsonl has."""
    callbacks = config.get("callbacks")
    if not isinstance(callbacks, Mapping):
        return dict(config)
    for name in callbacks:
        if name in RECORDED:
            changes.append(Change(f"callbacks.{name}", RECORDED[name], told=False))
        if name in LEFT_OUT:
            changes.append(Change(f"callbacks.{name}", LEFT_OUT[name]))
    kept = {k: v for k, v in callbacks.items() if k not in RECORDED and k not in LEFT_OUT}
    return {**config, "callbacks": kept}
