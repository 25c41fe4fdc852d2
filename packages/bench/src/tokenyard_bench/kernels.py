"""Measure a layer's pieces beside lower bounds of their times, and profile whole layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console

from tokenyard.measure.timing import Spread, Stages
from tokenyard.measure.trace import trace
from tokenyard_bench.case import Case
from tokenyard_bench.dense import DenseMatmuls
from tokenyard_bench.entrant import Entrant
from tokenyard_bench.entrants import backend_entrants, build_moe
from tokenyard_bench.pieces import Piece, build_pieces
from tokenyard_bench.sweep import Say, Sweep
from tokenyard_cli.results import Record

_LAYER = "layer: "
_BOUND = "bound: "


def bench_kernels(sweep: Sweep, backends: str, console: Console) -> Iterator[list[Record]]:
    """Measure every case. Yield one record for each piece and one for each backend's whole layer.

    The pieces use core's kernels and the chosen permutation and router. A layer's record has its
    kernels and the gaps between them. `backends` are names separated by commas, or "all".
    """
    return sweep.run(partial(_measure_case, sweep, backends), console)


def _measure_case(sweep: Sweep, backends: str, case: Case, say: Say) -> Iterator[Record]:
    pieces = build_pieces(case, build_moe(case), DenseMatmuls(case.workload, case.slots))
    layers = [entry for entry in backend_entrants(case, backends) if isinstance(entry, Entrant)]
    calls: dict[str, Stages] = {}
    for name, piece in pieces.items():
        calls[name] = _single(piece.call)
        if piece.bound is not None:
            calls[_BOUND + name] = _single(piece.bound)
    calls |= {_LAYER + layer.name: layer.stages(case) for layer in layers}
    spreads = sweep.time(calls, say)
    for name, piece in pieces.items():
        yield _piece_record(name, piece, spreads)
    for layer in layers:
        say(f"profiling {layer.name}")
        yield _layer_record(case, layer, spreads[_LAYER + layer.name][-1])


def _single(call: Callable[[], object]) -> Stages:
    return (lambda _: call(),)


def _piece_record(name: str, piece: Piece, spreads: dict[str, list[Spread]]) -> Record:
    bound = None if piece.bound is None else spreads[_BOUND + name][0]._asdict()
    return {
        "piece": name,
        "ms": spreads[name][0]._asdict(),
        "best_ms": bound,
        "best": piece.bound_name,
    }


def _layer_record(case: Case, layer: Entrant, step: Spread) -> Record:
    profile = trace(layer.stages(case), case.workload.device)
    kernels = profile.kernels
    busy = sum(kernel.milliseconds for kernel in kernels)
    # Time without a kernel. Not negative: on a CPU the profiler itself makes the kernels slower.
    gap = max(0.0, step.median - busy)
    return {
        "layer": layer.name,
        "ms": step._asdict(),
        "kernels": [kernel._asdict() for kernel in kernels],
        "sequence": [kernel._asdict() for kernel in profile.sequence],
        "busy_ms": round(busy, 5),
        "gap_ms": round(gap, 5),
    }
