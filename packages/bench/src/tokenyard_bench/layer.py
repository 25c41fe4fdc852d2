"""Measure one MoE layer by every backend, beside dense matmuls and peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from rich.console import Console

from tokenyard.measure.memory import peak_bytes, saved_bytes
from tokenyard.measure.timing import Spread, Stages
from tokenyard.measure.trace import trace
from tokenyard_bench.case import Case, busiest
from tokenyard_bench.dense import DenseMatmuls
from tokenyard_bench.entrant import Entrant, SkippedEntrant
from tokenyard_bench.entrants import backend_entrants, peer_entrants
from tokenyard_bench.oracle import Verdict, judge
from tokenyard_bench.sweep import Say, Sweep, release_memory
from tokenyard_cli.results import Record

DENSE = "dense"
"""Name of the dense matmuls among the entrants."""

Measurement = Callable[[Sweep, Mapping[str, Stages]], dict[str, Record]]
"""Measures entrants' layers once more. Returns facts for the record of each."""


def bench_layer(
    sweep: Sweep,
    backends: str,
    peers: str,
    console: Console,
    more: Mapping[str, Measurement] = MappingProxyType({}),
    microbatches: int = 1,
) -> Iterator[list[Record]]:
    """Measure every case. Yield, for each case, one record for each entrant.

    `backends` and `peers` are names separated by commas, or "all"; `peers` may be "none". Records
    have the facts of `more`, too: it maps a progress message to a function that measures the layers
    again. A step is the mean of so many `microbatches`, between which the weights do not change.
    """

    def measure_case(case: Case, say: Say) -> Iterator[Record]:
        entrants = [*backend_entrants(case, backends), *peer_entrants(case, peers)]
        correct: dict[str, Record] = {}
        timed: dict[str, Entrant] = {}
        for entrant in entrants:
            say(f"checking {entrant.name}")
            record = _check(case, entrant)
            if record["note"] is None and isinstance(entrant, Entrant):
                correct[entrant.name] = record
                timed[entrant.name] = entrant
            else:
                yield record
        calls = {name: entrant.stages(case, microbatches) for name, entrant in timed.items()}
        spreads = sweep.time(
            {DENSE: DenseMatmuls(case.workload, case.slots).stages(), **calls}, say
        )
        alone = {name: entrant.stages(case) for name, entrant in timed.items()}
        for step, times in more.items():
            say(step)
            for name, facts in times(sweep, alone).items():
                correct[name] |= facts
        yield from _timed(correct, spreads, microbatches)

    return sweep.run(measure_case, console)


def _timed(
    correct: dict[str, Record],
    spreads: dict[str, list[Spread]],
    microbatches: int,
) -> Iterator[Record]:
    """Yield the record of the dense matmuls, and those of correct entrants with their times."""
    dense = spreads.pop(DENSE)
    spreads = {name: [first, step.of_one(microbatches)] for name, (first, step) in spreads.items()}
    yield {"contestant": DENSE, "group": "dense", "note": None} | _times(dense, dense)
    for name, record in correct.items():
        yield record | _times(spreads[name], dense)


def _check(case: Case, entrant: Entrant | SkippedEntrant) -> Record:
    """Compare an entrant with the oracle and measure its memory. A failure becomes its note."""
    head: Record = {"contestant": entrant.name, "group": entrant.group, "note": None}
    if isinstance(entrant, SkippedEntrant):
        return head | {"note": entrant.reason}
    try:
        verdict = judge(case, entrant)
        facts = _facts(case, entrant) | {"error": verdict.error, "allowed": verdict.allowed}
    # A failing peer or plugin must not end the benchmark of the others.
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        release_memory()
        reason = " ".join(str(error).split())[:160]
        return head | {"note": f"failed: {type(error).__name__}: {reason}"}
    return head | facts | {"note": _wrong(entrant, verdict)}


def _wrong(entrant: Entrant, verdict: Verdict) -> str | None:
    allowed = verdict.allowed * entrant.looser
    if verdict.error <= allowed:
        return None
    return (
        f"wrong: {verdict.worst} is off by {verdict.error:.2e} from float64, "
        f"and {allowed:.2e} is allowed"
    )


def _facts(case: Case, entrant: Entrant) -> Record:
    """Measure everything but time."""
    stages = entrant.stages(case)
    device = case.workload.device
    with torch.no_grad():
        ids = entrant.layer()[1].topk_ids
    saved = saved_bytes(entrant.forward, entrant.leaves(case)[1:])
    release_memory()  # else copies of weights that exist already are missing from the peak
    facts: Record = {
        "busiest": round(busiest(ids, case.workload.num_experts), 3),
        "saved_bytes": saved,
        "peak_bytes": peak_bytes(stages, device),
    }
    if device.type == "cuda":
        profile = trace(stages, device)
        facts |= {"launches": profile.launches, "waits": profile.waits}
    return facts


def _times(spreads: list[Spread], dense: list[Spread]) -> Record:
    """Return the times of a forward pass and of a step, and their ratios to the dense matmuls."""
    forward, step = spreads
    return {
        "forward_ms": forward._asdict(),
        "step_ms": step._asdict(),
        "forward_efficiency": round(dense[0].median / forward.median, 4),
        "efficiency": round(dense[1].median / step.median, 4),
    }
