"""Find the changes between two benchmark files that exceed their noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenyard import ConfigError
from tokenyard.measure.timing import Spread
from tokenyard_cli.results import Record

_SIGMAS = 3.0
_LEAST = 0.01  # a smaller relative change does not matter, even if it is significant

_TIMES = {"forward_ms": "forward", "backward_ms": "backward", "step_ms": "step", "ms": ""}
"""The keys of times in a record, and what each adds to its name."""


class Change(NamedTuple):
    """One time in both files."""

    what: str
    before: float  # ms
    after: float  # ms
    noise: float  # ms, of the difference
    verdict: str  # faster, slower, same

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """Return the changes of the times that both files have, and the times that only one has.

    A difference counts if it exceeds 1 % and three standard errors of the two medians together.
    The standard error of a median of n samples with quartiles q1 and q3 is estimated as
    1.253 (q3 - q1) / (1.349 sqrt(n)), as for normal samples. Raises ConfigError for files of
    different kinds.
    """
    if before["kind"] != after["kind"]:
        raise ConfigError(
            f"one file holds bench {before['kind']}, the other bench {after['kind']}; "
            "give two of a kind"
        )
    old = dict(_times(before["records"]))
    new = dict(_times(after["records"]))
    changes = [_change(what, old[what], new[what]) for what in old if what in new]
    unmatched = [f"only before: {what}" for what in old if what not in new]
    unmatched += [f"only after: {what}" for what in new if what not in old]
    return changes, unmatched


def standard_error(spread: Spread) -> float:
    """Return the standard error of a spread's median, in ms."""
    return 1.253 * (spread.high - spread.low) / (1.349 * math.sqrt(spread.repetitions))


def _times(records: Sequence[Record]) -> Iterator[tuple[str, Spread]]:
    for record in records:
        for key in _TIMES:
            if key in record:
                yield _name(record, key), Spread(**record[key])


def _name(record: Record, key: str) -> str:
    shape = record.get("shape", {}).get("name")
    subject = next(
        record[name] for name in ("contestant", "piece", "layer", "work") if name in record
    )
    case = (shape, record.get("dtype"), record.get("routing"))
    words = (*case, subject, record.get("backend"), _TIMES[key])
    return ", ".join(str(word) for word in words if word)


def _change(what: str, before: Spread, after: Spread) -> Change:
    noise = _SIGMAS * math.hypot(standard_error(before), standard_error(after))
    difference = after.median - before.median
    if abs(difference) <= max(noise, _LEAST * before.median):
        verdict = "same"
    else:
        verdict = "slower" if difference > 0 else "faster"
    return Change(what, before.median, after.median, noise, verdict)
