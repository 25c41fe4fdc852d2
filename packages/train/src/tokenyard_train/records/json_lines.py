"""Records of a run as lines of JSON, which has no nan and inf."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

_NUMBERS = {
    "train": ("batch", "loss", "seconds"),
    "eval": ("batch", "loss", "bits_per_byte"),
}
"""Keys that every record of a kind has; their values are numbers."""

_NOT_FINITE = ("nan", "inf", "-inf")


def to_line(record: dict[str, Any]) -> str:
    """Return a record as JSON, with each number that is not finite as text, such as "nan"."""
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        return json.dumps(_each(record, _as_text))


def from_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None if it is damaged."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            return None
        # a skipped step has text for these
        if record["kind"] != "skipped" and any(
            f'"{each}"'.encode() in line for each in _NOT_FINITE
        ):
            record = _each(record, _as_number)
    except (ValueError, RecursionError):
        return None
    numbers = [record.get(key) for key in _NUMBERS.get(record["kind"], ())]
    return record if all(type(number) in (int, float) for number in numbers) else None


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _as_number(value: Any) -> Any:
    return float(value) if value in _NOT_FINITE else value


def _each(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a value with all that its dicts and lists hold converted."""
    if isinstance(value, dict):
        return {key: _each(item, convert) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(item, convert) for item in value]
    return convert(value)
