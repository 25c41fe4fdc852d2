"""The table of `tokenyard bench generate`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record


def print_generate(records: Sequence[Record], console: Console) -> None:
    """Print each entrant's speed, and ours over theirs with the same number of prompts.

    A peer that was not measured has the reason instead, below the table.
    """
    ours = {record["batch"]: record for record in records if record is _first(records, record)}
    columns = ("prompts", "tokens/s", "request ms", "ms a token", "ours / theirs")
    table = Table("", *columns, title_justify="left")
    for record in sorted(records, key=lambda record: record["batch"]):
        cells = ("-",) * 4 if "error" in record else _speeds(record, ours[record["batch"]])
        table.add_row(record["contestant"], str(record["batch"]), *cells)
    console.print(table)
    for record in records:
        if "error" in record:
            name, batch = record["contestant"], record["batch"]
            print_line(console, f"{name}, prompts {batch}: {record['error']}")


def _speeds(record: Record, ours: Record) -> tuple[str, ...]:
    ratio = ours["tokens_per_s"] / record["tokens_per_s"]
    return (
        f"{record['tokens_per_s']:,.0f}",
        f"{record['request_ms']:,.1f}",
        f"{record['token_ms']:.2f}",
        "" if record is ours else f"{ratio:.2f}x",
    )


def _first(records: Sequence[Record], record: Record) -> Record:
    """Return the first record of the same batch, which is ours."""
    return next(other for other in records if other["batch"] == record["batch"])
