"""Measure routers and permutations of every backend, beside copies of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from tokenyard import default_registry
from tokenyard.backend import Kind
from tokenyard.measure.timing import Stages
from tokenyard_bench.case import Case
from tokenyard_bench.requests import parse_names
from tokenyard_bench.routing_calls import Timed, permutation_calls, plan_rows, router_calls
from tokenyard_bench.routing_check import PlannedRows
from tokenyard_bench.sweep import Say, Sweep
from tokenyard_cli.results import Record

_COPY = "copy for "
_KINDS: tuple[Kind, ...] = ("permutation", "router")


def bench_routing(sweep: Sweep, backends: str, console: Console) -> Iterator[list[Record]]:
    """Measure every case. Yield one record for each call of each backend.

    `backends` are names of permutations and routers, separated by commas, or "all". Raises
    ConfigError for a name that is neither.
    """
    offers = (offer for kind in _KINDS for offer in default_registry().offers(kind))
    installed = list(dict.fromkeys(offer.backend.name for offer in offers))
    names = parse_names("--backends", backends, installed, installed)
    return sweep.run(partial(_measure_case, sweep, names), console)


def _measure_case(sweep: Sweep, names: Sequence[str], case: Case, say: Say) -> Iterator[Record]:
    """Check each backend, then time the calls of the correct ones in turns with copies."""
    rows = plan_rows(case)
    calls: dict[tuple[str, str], Timed] = {}
    for kind in _KINDS:
        for name, backend in _backends(kind, names, case):
            if isinstance(backend, str):
                yield {"work": kind, "backend": name, "note": backend}
                continue
            say(f"checking {kind} {name}")
            timed, fault = _calls(kind, backend, rows, case)
            if fault is not None:
                yield {"work": kind, "backend": name, "note": f"wrong: {fault}"}
                continue
            calls |= {(work, name): call for work, call in timed.items()}
    yield from _time(sweep, calls, say)


def _backends(kind: Kind, names: Sequence[str], case: Case) -> Iterator[tuple[str, Any]]:
    """Yield the named backends of a kind: name, and class or the reason why it is unusable."""
    for offer in default_registry().offers(kind):
        if offer.backend.name in names:
            reason = offer.backend.unusable(case.workload)
            yield offer.backend.name, offer.backend.load() if reason is None else reason


def _calls(
    kind: Kind, backend: Any, rows: PlannedRows, case: Case
) -> tuple[dict[str, Timed], str | None]:
    if kind == "permutation":
        return permutation_calls(backend(case.workload), rows, case)
    return router_calls(backend, case)


def _time(sweep: Sweep, calls: dict[tuple[str, str], Timed], say: Say) -> Iterator[Record]:
    stages = {f"{work} by {name}": _single(timed.call) for (work, name), timed in calls.items()}
    for size in {timed.bytes for timed in calls.values()}:
        stages[f"{_COPY}{size}"] = _single(_copy(size, sweep.device))
    spreads = sweep.time(stages, say)
    for (work, name), timed in calls.items():
        spread = spreads[f"{work} by {name}"][0]
        copy = spreads[f"{_COPY}{timed.bytes}"][0]
        yield {
            "work": work,
            "backend": name,
            "note": None,
            "bytes": timed.bytes,
            "ms": spread._asdict(),
            "best_ms": copy._asdict(),
            "bandwidth": round(copy.median / spread.median, 4),
        }


def _single(call: Callable[[], object]) -> Stages:
    return (lambda _: call(),)


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    """Return a copy that reads and writes `size` bytes in total."""
    source = torch.zeros(size // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
