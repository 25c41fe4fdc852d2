"""The tables of `bench exchange`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenyard.units import describe_bytes
from tokenyard_bench.tables.titles import case_key, case_title
from tokenyard_cli.results import Record

_TIMES = ("forward_ms", "backward_ms", "step_ms")
_RATES = ("forward_tflops", "backward_tflops", "step_tflops")
_COLUMNS = ("forward ms", "backward ms", "back to back ms")
_RATE_COLUMNS = ("fwd TFLOP/s", "bwd TFLOP/s", "both")
_CHECKS = ("sent", "peak memory", "difference", "error")


def print_exchanges(records: Sequence[Record], console: Console) -> None:
    """Print two tables for each case: times with notes below, and the stages of each exchange."""
    for _, group in groupby(records, case_key):
        case = list(group)
        console.print(_times_table(case))
        marked = [record for record in case if "stages" in record]
        if marked:
            console.print(_stages_table(marked))


def _times_table(records: Sequence[Record]) -> Table:
    head = records[0]
    title = (
        f"{case_title(head)}\n{head['ranks']} ranks, T tokens each; busiest expert "
        f"{head['busiest']:.2f}x the mean, busiest rank {head['busiest_rank']:.2f}x"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in (*_COLUMNS, *_RATE_COLUMNS, *_CHECKS):
        table.add_column(name, justify="right")
    for record in records:
        style = "bold" if record["group"] == "exchange" else None
        table.add_row(*_cells(record), style=style)
    notes = [
        f"{record['contestant']}: {escape(record['note'])}"
        for record in records
        if record["note"] is not None
    ]
    table.caption = "\n".join(notes) or None
    table.caption_justify = "left"
    return table


def _cells(record: Record) -> list[str]:
    if record["note"] is not None:
        return [record["contestant"], "-"]
    cells = [record["contestant"]]
    cells += [_ms(record[key]["median"]) for key in _TIMES]
    cells += [_ms(record[key]) for key in _RATES]
    if "error" in record:
        sent = sum(record["sent_bytes"].values())
        cells += [
            describe_bytes(sent) if sent else "-",
            describe_bytes(record["peak_bytes"]),
            f"{record['difference']:.1e}",
            f"{record['error']:.1e}",
        ]
    return cells


def _stages_table(records: Sequence[Record]) -> Table:
    """Return the milliseconds of each stage, forward and backward, with marks that slow it down."""
    title = "stages in ms, on the rank whose experts take longest"
    table = Table("", "", title=title, title_justify="left")
    stages = list(records[0]["stages"]["forward"])
    waits = any("host_wait_ms" in record for record in records)
    for name in (*stages, "sum", "matmuls", *(["host waits"] if waits else [])):
        table.add_column(name, justify="right")
    for record in records:
        forward, step = (record["kinds_ms"][key].get("matmuls", 0.0) for key in ("forward", "step"))
        matmuls = {"forward": forward, "backward": max(0.0, step - forward)}
        for direction in ("forward", "backward"):
            times = record["stages"][direction]
            cells = [_ms(times[stage]) if times[stage] else "" for stage in stages]
            cells += [_ms(sum(times.values())), _ms(matmuls[direction])]
            if direction == "forward" and "host_wait_ms" in record:
                cells.append(_ms(record["host_wait_ms"]))
            name = record["contestant"] if direction == "forward" else ""
            table.add_row(name, direction, *cells)
    return table


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"
