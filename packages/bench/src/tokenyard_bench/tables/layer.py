"""The tables of `bench layer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenyard.units import describe_bytes
from tokenyard_bench.tables.titles import case_key, case_title
from tokenyard_cli.results import Record

_COLUMNS = ("forward ms", "fwd+bwd ms", "efficiency fwd", "fwd+bwd")
_FACTS = ("saved", "peak memory", "error")
_GPU_FACTS = ("launches", "waits")
_LAUNCHES = ("idle", "host", "graph")
_LAUNCH_TITLE = "the same in ms: from an idle GPU, time of the host, as a CUDA graph"
_HELD = ("free", "held")


def print_layers(records: Sequence[Record], console: Console) -> None:
    """Print a table for each case, with times, efficiencies, memory, and notes below."""
    for _, group in groupby(records, case_key):
        ordered = sorted(group, key=_order)
        console.print(_table(ordered))
        if any("held" in record for record in ordered):
            console.print(_more_times(ordered, _held_title(ordered), _HELD))
        if any("idle" in record for record in ordered):
            console.print(_more_times(ordered, _LAUNCH_TITLE, _LAUNCHES))


def _order(record: Record) -> tuple[bool, float]:
    """Sort by time, entrants without a time last."""
    step = record["step_ms"]["median"] if "step_ms" in record else 0.0
    return record["note"] is not None, step


def _table(records: Sequence[Record]) -> Table:
    busiest = next((record["busiest"] for record in records if "busiest" in record), None)
    skew = "" if busiest is None else f"; busiest expert {busiest:.2f}x the mean"
    table = Table(title=case_title(records[0]) + skew, title_justify="left")
    table.add_column("", no_wrap=True)
    gpu = any("launches" in record for record in records)
    for name in (*_COLUMNS, *_FACTS, *(_GPU_FACTS if gpu else ())):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(*_cells(record, gpu), style="bold" if record["group"] == "backend" else None)
    notes = [
        f"{record['contestant']}: {escape(record['note'])}\n"
        for record in records
        if record["note"] is not None
    ]
    table.caption = "".join((*_gains(records), *notes)) or None
    table.caption_justify = "left"
    return table


def _gains(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each backend with options whose form without them was measured, too."""
    measured = {r["contestant"]: r for r in records if r["note"] is None and "error" in r}
    for name, record in measured.items():
        base = measured.get(name.partition(":")[0])
        if base is None or base is record:
            continue
        faster = base["step_ms"]["median"] / record["step_ms"]["median"]
        yield (
            f"{escape(name)}: {faster:.2f} times as fast as {base['contestant']}, "
            f"{_change(record, base, 'saved_bytes')} saved, "
            f"{_change(record, base, 'peak_bytes')} peak memory\n"
        )


def _change(record: Record, base: Record, fact: str) -> str:
    """Return how many bytes more or less a record has than another."""
    more = record[fact] - base[fact]
    return f"{describe_bytes(abs(more))} {'less' if more < 0 else 'more'}"


def _held_title(records: Sequence[Record]) -> str:
    held = next(r["multiprocessors_held"] for r in records if "multiprocessors_held" in r)
    return f"the same in ms from an idle GPU: free, and with {held} multiprocessors held"


def _more_times(records: Sequence[Record], title: str, kinds: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for kind in kinds:
        table.add_column(f"{kind} fwd", justify="right")
        table.add_column(f"{kind} fwd+bwd", justify="right")
    for record in records:
        if kinds[0] in record:
            times = [record[kind][key] for kind in kinds for key in ("forward", "step")]
            table.add_row(record["contestant"], *("-" if t is None else _ms(t) for t in times))
    return table


def _cells(record: Record, gpu: bool) -> list[str]:
    if record["note"] is not None:
        return [record["contestant"], "-"]
    cells = [
        record["contestant"],
        _ms(record["forward_ms"]["median"]),
        _ms(record["step_ms"]["median"]),
        f"{record['forward_efficiency']:.3f}",
        f"{record['efficiency']:.3f}",
    ]
    if "error" in record:
        cells += [
            describe_bytes(record["saved_bytes"]),
            describe_bytes(record["peak_bytes"]),
            f"{record['error']:.1e}",
        ]
        if gpu:
            cells += [str(record["launches"]), str(record["waits"])]
    return cells


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"
