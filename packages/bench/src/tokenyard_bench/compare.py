"""`tokenyard bench compare`: what changed between two benchmark files, beyond the noise of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tokenyard import ConfigError
from tokenyard.measure.timing import Spread

Record = dict[str, Any]

_SIGMAS = 3.0
_LEAST = 0.01  # smaller changes are not worth a word, however certain


class Change(NamedTuple):
    """A time in two files."""

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
    """Return the changes of every time that both files hold, and what only one of them has.

    A difference counts beyond three standard errors of both medians together, and beyond 1 %. The standard error of a
    median of n samples with quartiles q1, q3 is taken as 1.253 (q3 - q1) / (1.349 sqrt(n)), as for normal samples.
    Raises ConfigError for files of different kinds.
    """
    if before["kind"] != after["kind"]:
        raise ConfigError(
            f"one file holds bench {before['kind']}, the other bench {after['kind']}; give two of a kind"
        )
    old, new = dict(_times(before["records"])), dict(_times(after["records"]))
    changes = [_change(what, old[what], new[what]) for what in old if what in new]
    alone = [f"only before: {what}" for what in old if what not in new]
    return changes, alone + [f"only after: {what}" for what in new if what not in old]


def standard_error(spread: Spread) -> float:
    """Return the standard error of a spread's median, in ms."""
    return 1.253 * (spread.high - spread.low) / (1.349 * math.sqrt(spread.repetitions))


def _times(records: Sequence[Record]) -> Iterator[tuple[str, Spread]]:
    for record in records:
        for key in ("forward_ms", "step_ms", "ms"):
            if key in record:
                yield _name(record, key), Spread(**record[key])


def _name(record: Record, key: str) -> str:
    shape = record.get("shape", {}).get("name")
    who = next(record[name] for name in ("contestant", "piece", "layer", "work") if name in record)
    part = {"forward_ms": "forward", "step_ms": "step", "ms": ""}[key]
    words = (shape, record.get("dtype"), record.get("routing"), who, record.get("backend"), part)
    return ", ".join(str(word) for word in words if word)


def _change(what: str, before: Spread, after: Spread) -> Change:
    noise = _SIGMAS * math.hypot(standard_error(before), standard_error(after))
    difference = after.median - before.median
    certain = abs(difference) > max(noise, _LEAST * before.median)
    verdict = "same" if not certain else ("slower" if difference > 0 else "faster")
    return Change(what, before.median, after.median, noise, verdict)


def print_changes(changes: Sequence[Change], alone: Sequence[str], console: Console) -> None:
    """Print what became faster or slower, how many stayed, and what has no counterpart."""
    table = Table("", "before ms", "after ms", "after / before", "noise ms", "")
    told = [change for change in changes if change.verdict != "same"]
    for change in sorted(told, key=lambda c: c.ratio):
        colour = {"faster": "green", "slower": "red"}[change.verdict]
        table.add_row(
            change.what,
            f"{change.before:.3f}",
            f"{change.after:.3f}",
            f"{change.ratio:.3f}",
            f"{change.noise:.3f}",
            f"[{colour}]{change.verdict}[/{colour}]",
        )
    if told:
        console.print(table)
    console.print(
        f"{len(changes) - len(told)} of {len(changes)} times did not change beyond the noise",
        highlight=False,
    )
    for line in alone:
        console.print(line, highlight=False)
