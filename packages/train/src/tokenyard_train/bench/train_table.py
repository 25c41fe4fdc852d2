"""The table of `tokenyard bench train`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tokenyard.units import describe_bytes, describe_flop_rate
from tokenyard_cli.results import Record

_COLUMNS = (
    "step ms",
    "tokens/s",
    "of a rank",
    "its FLOP/s",
    "peak memory",
    "parameters",
    "weights",
    "ours / theirs",
)


def print_train(records: Sequence[Record], console: Console) -> None:
    """Print speed and memory of each entrant, and how our step divides into phases."""
    ours = records[0]
    table = Table("", *_COLUMNS, title_justify="left")
    for record in records:
        ratio = ours["tokens_per_s"] / record["tokens_per_s"]
        table.add_row(*_cells(record), "" if record is ours else f"{ratio:.2f}x")
    console.print(table)
    _print_phases(ours, console)
    _print_kinds(records, console)


def _cells(record: Record) -> list[str]:
    return [
        record["contestant"],
        f"{record['step_ms']['median']:.1f}",
        f"{record['tokens_per_s']:,.0f}",
        f"{record['tokens_per_s'] / record['processes']:,.0f}",
        describe_flop_rate(record["flops_per_s"] / record["processes"]),
        describe_bytes(record["peak_bytes"]),
        f"{record['parameters']:,}",
        record["weights"],
    ]


def _print_phases(ours: Record, console: Console) -> None:
    shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in ours["shares"].items())
    console.print(f"where our step's time goes: {shares}", highlight=False)
    if retries := ours["allocation_retries"]:
        console.print(
            f"memory was full {retries} times; PYTORCH_ALLOC_CONF=expandable_segments:True may help"
        )
    for name, milliseconds in ours["collectives_ms"].items():
        share = 100 * milliseconds / ours["step_ms"]["median"]
        console.print(
            f"{name}: {milliseconds:.1f} ms, {share:.1f} % of a step, beside other work",
            highlight=False,
        )


def _print_kinds(records: Sequence[Record], console: Console) -> None:
    """Print where each entrant's step goes by kind of work."""
    table = Table("kind of work", title_justify="left")
    for record in records:
        table.add_column(f"{record['contestant']} ms")
        table.add_column("share")
    kinds = dict.fromkeys(kind for record in records for kind in record["kinds"])
    for kind in kinds:
        cells = [_kind_cells(record["kinds"].get(kind)) for record in records]
        table.add_row(kind, *(cell for pair in cells for cell in pair))
    console.print(table)
    if "gaps" in kinds:
        console.print(f"the host works {records[0]['host_ms']:.1f} ms of our step, beside the GPU")


def _kind_cells(kind: Record | None) -> tuple[str, str]:
    return ("", "") if kind is None else (f"{kind['ms']:.2f}", f"{100 * kind['share']:.1f} %")
