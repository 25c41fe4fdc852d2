"""`tokenyard bench layer`: one MoE layer by every backend, beside dense products and peers, in one run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from tokenyard.measure.memory import peak_bytes, saved_bytes
from tokenyard.measure.timing import Spread, Stages, clock_for, measure
from tokenyard.measure.trace import trace
from tokenyard_bench.case import DTYPES, Case, RoutingKind, busiest, make_case
from tokenyard_bench.dense import DenseProducts
from tokenyard_bench.entrants import Absent, Contestant, backends, peers
from tokenyard_bench.oracle import Verdict, judge
from tokenyard_bench.shapes import Shape

DENSE = "dense"
"""The name of the dense products among the contestants."""

_PEER_ERRORS = (
    8  # times what a backend may be off: peers add up in lower precision, and are not ours to mend
)

Record = dict[str, Any]


@dataclass(frozen=True)
class LayerBench:
    """What to measure."""

    shapes: Sequence[Shape]
    routings: Sequence[RoutingKind]
    dtypes: Sequence[str]  # keys of DTYPES
    device: torch.device
    backends: str = "all"
    peers: str = "all"
    activation: str = "swiglu"
    repetitions: int = 20
    seed: int = 0


def bench_layer(bench: LayerBench, console: Console) -> Iterator[list[Record]]:
    """Measure every shape, routing and dtype; yield for each the records of its contestants."""
    for shape in bench.shapes:
        for name in bench.dtypes:
            for routing in bench.routings:
                console.print(
                    f"{shape.name}, {name}, {routing} routing ...", style="dim", highlight=False
                )
                torch.manual_seed(bench.seed)
                case = make_case(shape, routing, DTYPES[name], bench.device, bench.activation)
                head = {"shape": shape._asdict(), "dtype": name, "routing": routing}
                yield [head | record for record in _one_case(bench, shape, case)]
                del case
                _release()


def _one_case(bench: LayerBench, shape: Shape, case: Case) -> Iterator[Record]:
    """Judge each contestant, then time those that are right, in turns with the dense products."""
    right: dict[str, Record] = {}
    works: dict[str, Stages] = {}
    for entry in [*backends(case, bench.backends), *peers(case, bench.peers)]:
        record = _tried(case, entry)
        if record["note"] is None and isinstance(entry, Contestant):
            right[entry.name], works[entry.name] = record, entry.stages(case)
        else:
            yield record
    dense = DenseProducts(shape, case.workload)
    spreads = measure({DENSE: dense.stages(), **works}, clock_for(bench.device), bench.repetitions)
    ceiling = spreads.pop(DENSE)
    yield {"contestant": DENSE, "group": "dense", "note": None} | _times(ceiling, ceiling)
    for name, record in right.items():
        yield record | _times(spreads[name], ceiling)


def _tried(case: Case, entry: Contestant | Absent) -> Record:
    """Judge a contestant against the oracle and take what needs no clock; a failure becomes its note."""
    head: Record = {"contestant": entry.name, "group": entry.group, "note": None}
    if isinstance(entry, Absent):
        return head | {"note": entry.reason}
    try:
        verdict = judge(case, entry.layer)
        facts = _facts(case, entry) | {"error": verdict.error, "allowed": verdict.allowed}
    except (
        RuntimeError,
        ImportError,
        TypeError,
        ValueError,
    ) as error:  # a peer's or plugin's; the others go on
        _release()
        return head | {
            "note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        }
    return head | facts | {"note": _wrong(entry, verdict)}


def _wrong(entry: Contestant, verdict: Verdict) -> str | None:
    allowed = verdict.allowed * (1 if entry.group == "backend" else _PEER_ERRORS)
    if verdict.error <= allowed:
        return None
    return f"wrong: {verdict.worst} is off by {verdict.error:.2e} from float64, and {allowed:.2e} is allowed"


def _facts(case: Case, entry: Contestant) -> Record:
    stages, device = entry.stages(case), case.workload.device
    with torch.no_grad():
        ids = entry.layer()[1].topk_ids
    facts: Record = {
        "busiest": round(busiest(ids, case.workload.num_experts), 3),
        "saved_bytes": saved_bytes(entry.layer, case.leaves()[1:]),
        "peak_bytes": peak_bytes(stages, device),
    }
    if device.type == "cuda":
        seen = trace(stages, device)
        facts |= {"launches": seen.launches, "waits": seen.waits}
    return facts


def _times(own: list[Spread], ceiling: list[Spread]) -> Record:
    forward, step = own
    return {
        "forward_ms": forward._asdict(),
        "step_ms": step._asdict(),
        "forward_efficiency": round(ceiling[0].median / forward.median, 4),
        "efficiency": round(ceiling[1].median / step.median, 4),
    }


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
