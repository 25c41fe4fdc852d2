"""The tables of `bench routing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenyard_bench.tables.titles import case_key, case_title
from tokenyard_cli.results import Record


def print_routing(records: Sequence[Record], console: Console) -> None:
    """Print a table for each case: each call by each backend, beside a copy of as many bytes."""
    for _, group in groupby(records, case_key):
        console.print(_table(list(group)))


def _table(records: Sequence[Record]) -> Table:
    table = Table("work", "backend", title=case_title(records[0]), title_justify="left")
    for name in ("microseconds", "copy of as many bytes", "share of its bandwidth"):
        table.add_column(name, justify="right")
    timed = [record for record in records if record["note"] is None]
    timed.sort(key=_first_seen(timed))
    for work, by_backend in groupby(timed, lambda record: record["work"]):
        label = work
        for record in by_backend:
            time, copy = (1000 * record[key]["median"] for key in ("ms", "best_ms"))
            share = f"{copy / time:.2f}"
            table.add_row(label, record["backend"], f"{time:.1f}", f"{copy:.1f}", share)
            label = ""
    notes = [
        f"{record['work']} {record['backend']}: {escape(record['note'])}"
        for record in records
        if record["note"] is not None
    ]
    table.caption = "\n".join(notes) or None
    table.caption_justify = "left"
    return table


def _first_seen(records: Sequence[Record]) -> Callable[[Record], int]:
    """Return a sort key that groups the records of a call, in the order of first appearance."""
    works = list(dict.fromkeys(record["work"] for record in records))
    return lambda record: works.index(record["work"])
