"""The tables of `bench kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenyard_bench.tables.titles import case_key, case_title
from tokenyard_cli.results import Record

_SHOWN = 14  # kernels of a layer
_FEW = 40  # launches that are shown one by one


def print_kernels(records: Sequence[Record], console: Console) -> None:
    """Print, for each case, its pieces with their bounds, and each backend's kernels with gaps."""
    for _, group in groupby(records, case_key):
        case = list(group)
        console.print(_pieces_table([record for record in case if "piece" in record]))
        for record in case:
            if "layer" in record:
                console.print(_kernels_table(record))


def _pieces_table(pieces: Sequence[Record]) -> Table:
    table = Table("piece", title=case_title(pieces[0]), title_justify="left")
    for name in ("ms", "at best ms", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("the best is")
    for record in pieces:
        milliseconds = record["ms"]["median"]
        cells = [record["piece"], f"{milliseconds:.3f}"]
        if record["best_ms"]:
            bound = record["best_ms"]["median"]
            cells += [f"{bound:.3f}", f"{bound / milliseconds:.2f}", record["best"]]
        table.add_row(*cells)
    table.add_section()
    table.add_row("sum", f"{sum(record['ms']['median'] for record in pieces):.3f}")
    return table


def _kernels_table(record: Record) -> Table:
    step = record["ms"]["median"]
    title = f"{record['layer']}: forward and backward {step:.3f} ms"
    table = Table("kernel", title=title, title_justify="left")
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right")

    def add_row(name: str, calls: str, milliseconds: float) -> None:
        share = f"{100 * milliseconds / step:.1f} %"
        table.add_row(escape(name[:90]), calls, f"{milliseconds:.3f}", share)

    # One by one, so that the matmuls that one kernel computes are told apart.
    few = 0 < len(record["sequence"]) <= _FEW
    shown = record["sequence"] if few else record["kernels"][:_SHOWN]
    for kernel in shown:
        add_row(kernel["name"], str(kernel["calls"]), kernel["milliseconds"])
    rest = record["busy_ms"] - sum(kernel["milliseconds"] for kernel in shown)
    add_row("the others", "", rest)
    add_row("gaps", "", record["gap_ms"])
    return table
