"""The tracker interface, and the numbers that a tracker receives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

_NOT_NUMBERS = frozenset(("kind", "batch"))


class Tracker(Protocol):
    """A service that displays metrics of a run. Constructor: ``cls(options, run: RunInfo)``."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers by name. `step` counts the optimizer steps done."""
        ...

    def finish(self, failed: bool) -> None:
        """Close the run, as failed or finished."""
        ...


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics record by name, such as ``train/loss``.

    Items of a list are named by their index: ``train/load/0/3`` is the load of expert 3 in MoE
    layer 0.
    """
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if key not in _NOT_NUMBERS:
            _flatten(f"{record['kind']}/{key}", value, numbers)
    return numbers


def _flatten(name: str, value: Any, numbers: dict[str, float]) -> None:
    """Add every number below `value` to `numbers`."""
    if isinstance(value, dict):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        numbers[name] = float(value)
        return
    for key, item in pairs:
        _flatten(f"{name}/{key}", item, numbers)
