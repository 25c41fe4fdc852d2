"""`tokenyard bench routing`: routers, plans and moves of every backend, beside copies of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenyard import ConfigError, default_registry
from tokenyard.backend import Kind
from tokenyard.errors import did_you_mean
from tokenyard.measure.timing import clock_for, measure
from tokenyard_bench.case import DTYPES, Case, make_case
from tokenyard_bench.layer import LayerBench
from tokenyard_bench.layer_table import case_key, case_title
from tokenyard_bench.routing_calls import Work, moved_of, permutation_works, router_works

Record = dict[str, Any]

_COPY = "copy for "
_KINDS: tuple[Kind, ...] = ("permutation", "router")


def bench_routing(bench: LayerBench, console: Console) -> Iterator[list[Record]]:
    """Measure every shape, routing and dtype; yield for each a record of every work of every backend.

    `bench.backends` are names of permutations and routers, or all. Raises ConfigError for one that is neither.
    """
    names = _names(bench.backends)
    for shape in bench.shapes:
        for dtype in bench.dtypes:
            for routing in bench.routings:
                console.print(
                    f"{shape.name}, {dtype}, {routing} routing ...", style="dim", highlight=False
                )
                torch.manual_seed(bench.seed)
                case = make_case(shape, routing, DTYPES[dtype], bench.device, bench.activation)
                head = {"shape": shape._asdict(), "dtype": dtype, "routing": routing}
                yield [head | record for record in _one_case(bench, case, names)]


def _names(asked: str) -> list[str]:
    known = list(
        dict.fromkeys(o.backend.name for kind in _KINDS for o in default_registry().offers(kind))
    )
    names = known if asked == "all" else asked.split(",")
    for name in names:
        if name not in known:
            listed = ", ".join(known)
            raise ConfigError(
                f"--backends {name!r} is unknown{did_you_mean(name, known)}; installed: {listed}, or all"
            )
    return names


def _one_case(bench: LayerBench, case: Case, names: Sequence[str]) -> Iterator[Record]:
    moved = moved_of(case)
    works: dict[tuple[str, str], Work] = {}
    for kind in _KINDS:
        for name, backend in _usable(kind, names, case):
            if isinstance(backend, str):
                yield {"work": kind, "backend": name, "note": backend}
                continue
            found, wrong = (
                permutation_works(backend(case.workload), moved, case)
                if kind == "permutation"
                else router_works(backend, case)
            )
            if wrong is not None:
                yield {"work": kind, "backend": name, "note": f"wrong: {wrong}"}
                continue
            works |= {(work, name): entry for work, entry in found.items()}
    yield from _timed(bench, works)


def _usable(kind: Kind, names: Sequence[str], case: Case) -> Iterator[tuple[str, Any]]:
    """Give each backend asked for, of those that there are of a kind: its class, or why it cannot be used."""
    for offer in default_registry().offers(kind):
        if offer.backend.name in names:
            reason = offer.backend.unusable(case.workload)
            yield offer.backend.name, offer.backend.load() if reason is None else reason


def _timed(bench: LayerBench, works: dict[tuple[str, str], Work]) -> Iterator[Record]:
    sizes = {work.bytes for work in works.values()}
    calls = {f"{work} by {name}": entry.call for (work, name), entry in works.items()}
    calls |= {f"{_COPY}{size}": _copy(size, bench.device) for size in sizes}
    stages = {name: ((lambda _, call=call: call()),) for name, call in calls.items()}
    spreads = measure(stages, clock_for(bench.device), bench.repetitions)
    for (work, name), entry in works.items():
        own, best = spreads[f"{work} by {name}"][0], spreads[f"{_COPY}{entry.bytes}"][0]
        times = {
            "ms": own._asdict(),
            "best_ms": best._asdict(),
            "bandwidth": round(best.median / own.median, 4),
        }
        yield {"work": work, "backend": name, "note": None, "bytes": entry.bytes} | times


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    """Return a copy that reads and writes so many bytes together."""
    source = torch.zeros(size // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def print_routing(records: Sequence[Record], console: Console) -> None:
    """Print a table for each case: each work by each backend, beside a copy of as many bytes."""
    for _, group in groupby(records, case_key):
        found = list(group)
        table = Table("work", "backend", title=case_title(found[0]), title_justify="left")
        for name in ("microseconds", "copy of as many bytes", "share of its bandwidth"):
            table.add_column(name, justify="right")
        timed = [record for record in found if record["note"] is None]
        for work, by_backend in groupby(
            sorted(timed, key=_order(timed)), lambda record: record["work"]
        ):
            for i, record in enumerate(by_backend):
                own, best = (1000 * record[key]["median"] for key in ("ms", "best_ms"))
                table.add_row(
                    "" if i else work,
                    record["backend"],
                    f"{own:.1f}",
                    f"{best:.1f}",
                    f"{best / own:.2f}",
                )
        notes = [
            f"{r['work']} {r['backend']}: {escape(r['note'])}"
            for r in found
            if r["note"] is not None
        ]
        table.caption, table.caption_justify = "\n".join(notes) or None, "left"
        console.print(table)


def _order(records: Sequence[Record]) -> Callable[[Record], int]:
    works = list(dict.fromkeys(record["work"] for record in records))
    return lambda record: works.index(record["work"])
