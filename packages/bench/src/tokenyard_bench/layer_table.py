"""Records of layers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Record = dict[str, Any]


def case_key(record: Record) -> tuple[str, str, str]:
    """Return what tells one measured case from another: shape, dtype and routing."""
    return record["shape"]["name"], record["dtype"], record["routing"]


def print_layers(records: Sequence[Record], console: Console) -> None:
    """Print a table for each case: times, efficiencies, memory, and why somebody is missing."""
    for key, group in groupby(records, case_key):
        console.print(_table(key, sorted(group, key=_rank)))


def case_title(record: Record) -> str:
    """Return a case in words: its name and size, the dtype and the routing."""
    s = record["shape"]
    size = f"T {s['tokens']}, D {s['dim']}, F {s['ffn_dim']}, E {s['num_experts']}, K {s['top_k']}"
    name = f"{s['name']}: " if "," not in s["name"] else ""
    return f"{name}{size}; {record['dtype']}, {record['routing']} routing"


def _rank(record: Record) -> tuple[bool, float]:
    return (record["note"] is not None, record["step_ms"]["median"] if "step_ms" in record else 0.0)


def _table(key: tuple[str, str, str], records: Sequence[Record]) -> Table:
    busiest = next(
        (f"; busiest expert {r['busiest']:.2f}x the mean" for r in records if "busiest" in r), ""
    )
    table = Table(title=case_title(records[0]) + busiest, title_justify="left")
    for name in (
        "",
        "forward ms",
        "fwd+bwd ms",
        "efficiency fwd",
        "fwd+bwd",
        "saved MiB",
        "peak MiB",
        "error",
    ):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    gpu = any("launches" in r for r in records)
    for name in ("launches", "waits") if gpu else ():
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(*_cells(record, gpu), style="bold" if record["group"] == "backend" else None)
    for record in records:
        if record["note"] is not None:
            table.caption = (
                f"{table.caption or ''}{record['contestant']}: {escape(record['note'])}\n"
            )
            table.caption_justify = "left"
    return table


def _cells(record: Record, gpu: bool) -> list[str]:
    if record["note"] is not None:
        return [record["contestant"], "-"]
    forward, step = record["forward_ms"]["median"], record["step_ms"]["median"]
    cells = [record["contestant"], _ms(forward), _ms(step)]
    cells += [f"{record['forward_efficiency']:.3f}", f"{record['efficiency']:.3f}"]
    if "error" not in record:
        return cells
    cells += [
        f"{record['saved_bytes'] / 2**20:.1f}",
        f"{record['peak_bytes'] / 2**20:.1f}",
        f"{record['error']:.1e}",
    ]
    return cells + ([str(record["launches"]), str(record["waits"])] if gpu else [])


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"
