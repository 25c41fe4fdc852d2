"""`tokenyard bench kernels`: a layer's pieces, what each could take at best, and what the profiler sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenyard.measure.timing import Stages, clock_for, measure
from tokenyard.measure.trace import trace
from tokenyard_bench.case import DTYPES, Case, make_case
from tokenyard_bench.dense import DenseProducts
from tokenyard_bench.entrants import Contestant, backends, build_moe
from tokenyard_bench.layer import LayerBench
from tokenyard_bench.layer_table import case_title
from tokenyard_bench.pieces import build_pieces

Record = dict[str, Any]

_LAYER, _BEST = "layer: ", "best: "
_SHOWN = 14  # kernels of the profile


def bench_kernels(bench: LayerBench, console: Console) -> list[Record]:
    """Time the pieces of each case by core's kernels and the chosen permutation and router; then profile each backend.

    Returns one record for each piece, and one for each backend's whole layer, with its kernels and the gaps between.
    """
    records: list[Record] = []
    for shape in bench.shapes:
        for name in bench.dtypes:
            for routing in bench.routings:
                console.print(
                    f"{shape.name}, {name}, {routing} routing ...", style="dim", highlight=False
                )
                torch.manual_seed(bench.seed)
                case = make_case(shape, routing, DTYPES[name], bench.device, bench.activation)
                head = {"shape": shape._asdict(), "dtype": name, "routing": routing}
                records += [
                    head | r for r in _one_case(bench, case, DenseProducts(shape, case.workload))
                ]
    return records


def _one_case(bench: LayerBench, case: Case, dense: DenseProducts) -> list[Record]:
    pieces = build_pieces(case, build_moe(case), dense)
    layers = [entry for entry in backends(case, bench.backends) if isinstance(entry, Contestant)]
    works: dict[str, Stages] = {}
    for name, piece in pieces.items():
        works[name] = _single(piece.call)
        if piece.ceiling is not None:
            works[_BEST + name] = _single(piece.ceiling)
    works |= {_LAYER + layer.name: layer.stages(case) for layer in layers}
    spreads = measure(works, clock_for(bench.device), bench.repetitions)
    found = []
    for name, piece in pieces.items():
        best = spreads[_BEST + name][0]._asdict() if piece.ceiling is not None else None
        found.append(
            {"piece": name, "ms": spreads[name][0]._asdict(), "best_ms": best, "best": piece.named}
        )
    return found + [
        _whole(case, layer, spreads[_LAYER + layer.name][-1]._asdict()) for layer in layers
    ]


def _whole(case: Case, layer: Contestant, step: dict[str, float]) -> Record:
    seen = trace(layer.stages(case), case.workload.device)
    busy = sum(kernel.milliseconds for kernel in seen.kernels)
    return {
        "layer": layer.name,
        "ms": step,
        "kernels": [kernel._asdict() for kernel in seen.kernels],
        "busy_ms": round(busy, 5),
        "gap_ms": round(
            max(0.0, step["median"] - busy), 5
        ),  # no kernel ran; the profiler itself slows a CPU
    }


def _single(call: Any) -> Stages:
    return (lambda _: call(),)


def print_kernels(records: Sequence[Record], console: Console) -> None:
    """Print, for each case, the pieces beside their ceilings, and each backend's kernels with the gaps."""
    cases = list(dict.fromkeys(case_title(r) for r in records))
    for title in cases:
        mine = [r for r in records if case_title(r) == title]
        console.print(_pieces_table(title, [r for r in mine if "piece" in r]))
        for record in (r for r in mine if "layer" in r):
            console.print(_kernels_table(record))


def _pieces_table(title: str, pieces: Sequence[Record]) -> Table:
    table = Table("piece", title=title, title_justify="left")
    for name in ("ms", "at best ms", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("the best is")
    for record in pieces:
        own, best = record["ms"]["median"], record["best_ms"]
        cells = (
            [f"{best['median']:.3f}", f"{best['median'] / own:.2f}", record["best"]]
            if best
            else ["", "", ""]
        )
        table.add_row(record["piece"], f"{own:.3f}", *cells)
    table.add_section()
    table.add_row("sum", f"{sum(r['ms']['median'] for r in pieces):.3f}")
    return table


def _kernels_table(record: Record) -> Table:
    whole = record["ms"]["median"]
    table = Table(
        "kernel",
        title=f"{record['layer']}: forward and backward {whole:.3f} ms",
        title_justify="left",
    )
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right")
    shown = record["kernels"][:_SHOWN]
    for kernel in shown:
        milliseconds = kernel["milliseconds"]
        table.add_row(
            escape(kernel["name"][:90]),
            str(kernel["calls"]),
            f"{milliseconds:.3f}",
            f"{100 * milliseconds / whole:.1f} %",
        )
    rest = record["busy_ms"] - sum(k["milliseconds"] for k in shown)
    table.add_row("the others", "", f"{rest:.3f}", f"{100 * rest / whole:.1f} %")
    table.add_row("gaps", "", f"{record['gap_ms']:.3f}", f"{100 * record['gap_ms'] / whole:.1f} %")
    return table
