"""What a tracker is, and the numbers that it gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

_NOT_NUMBERS = frozenset(("kind", "batch"))


class Tracker(Protocol):
    """Shows the metrics of a run somewhere. Constructed as ``cls(options, place)``; see Place."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take numbers by name, of so many optimizer steps done."""
        ...

    def finish(self, failed: bool) -> None:
        """End the run: it reached its duration, or failed."""
        ...


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics record by name: ``train/loss``, ``eval/bits_per_byte``, ``train/load/0/3``.

    Lists are counted through: the load of expert 3 in MoE layer 0 is ``train/load/0/3``.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if key not in _NOT_NUMBERS:
            _flatten(f"{record['kind']}/{key}", value, found)
    return found


def _flatten(name: str, value: Any, found: dict[str, float]) -> None:
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = ((str(i), item) for i, item in enumerate(value))  # type: ignore[assignment]
    else:
        found[name] = float(value)
        return
    for key, item in pairs:
        _flatten(f"{name}/{key}", item, found)
