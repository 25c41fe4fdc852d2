"""The table of `bench compare`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tokenyard_bench.compare import Change

_COLOURS = {"faster": "green", "slower": "red"}


def print_changes(changes: Sequence[Change], unmatched: Sequence[str], console: Console) -> None:
    """Print the faster and slower times, the number of others, and times without counterpart."""
    table = Table("", "before ms", "after ms", "after / before", "noise ms", "")
    changed = [change for change in changes if change.verdict != "same"]
    for change in sorted(changed, key=lambda change: change.ratio):
        colour = _COLOURS[change.verdict]
        table.add_row(
            change.what,
            f"{change.before:.3f}",
            f"{change.after:.3f}",
            f"{change.ratio:.3f}",
            f"{change.noise:.3f}",
            f"[{colour}]{change.verdict}[/{colour}]",
        )
    if changed:
        console.print(table)
    console.print(
        f"{len(changes) - len(changed)} of {len(changes)} times did not change beyond the noise",
        highlight=False,
    )
    for line in unmatched:
        console.print(line, highlight=False)
