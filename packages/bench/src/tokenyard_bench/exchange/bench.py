"""Measure one expert-parallel layer by every exchange, beside dense matmuls and peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from tokenyard import ConfigError
from tokenyard.divisors import divisors
from tokenyard.measure.timing import clock_for
from tokenyard_bench.case import Case
from tokenyard_bench.exchange.liger import Capacity, liger_candidate
from tokenyard_bench.exchange.measure import CaseMeasurement
from tokenyard_bench.exchange.ours import check_experts, parse_exchanges
from tokenyard_bench.exchange.rank_case import part_of
from tokenyard_bench.exchange.times import Timer
from tokenyard_bench.exchange.world import World
from tokenyard_bench.requests import parse_peers
from tokenyard_bench.shapes import Shape
from tokenyard_bench.sweep import Say, Sweep
from tokenyard_cli.results import Record

PEERS = ("liger",)


@dataclass(frozen=True)
class ExchangeSettings:
    """What is compared, and how."""

    exchanges: list[str]  # NAME, NAME:KEY=VALUE, or all
    experts: str = "auto"  # NAME or NAME:KEY=VALUE of the backend that computes the experts
    peers: str = "all"  # or none, or names separated by commas
    pause: float = 0.25  # seconds before each step from an idle device


def bench_exchange(
    sweep: Sweep, world: World, settings: ExchangeSettings, console: Console
) -> Iterator[list[Record]]:
    """Measure every case. Yield, for each case, one record for each entrant.

    All ranks call this, with equal arguments; `sweep.ranks` is the number of ranks. Their records
    differ in no time.
    """
    capacity = _capacity(sweep.shapes)
    peers = parse_peers(settings.peers, PEERS)
    check_experts(settings.experts)
    timer = Timer(world, clock_for(world.device), settings.pause, sweep.repetitions)

    def measure_case(whole: Case, say: Say) -> Iterator[Record]:
        case = part_of(whole, world.rank, world.size)
        requests = parse_exchanges(settings.exchanges, case.workload)
        expert, rank = case.busiest()
        skew = {"busiest": round(expert, 3), "busiest_rank": round(rank, 3)}
        head = {"ranks": world.size, **skew}
        measurement = CaseMeasurement(case, world, timer)
        say("timing dense matmuls")
        for record in measurement.dense():
            yield head | record
        candidates = [request.candidate(case, settings.experts, world) for request in requests]
        candidates += [liger_candidate(case, capacity) for _ in peers]
        for candidate in candidates:
            say(f"checking and timing {candidate.name}")
            torch.manual_seed(sweep.seed)  # so that all are checked on the same sample
            yield head | measurement.entrant(candidate)

    return sweep.run(measure_case, console)


def check_ranks(shapes: Sequence[Shape], ranks: int) -> None:
    """Raise ConfigError, with the numbers that would work, if the ranks do not divide experts."""
    for shape in shapes:
        experts = shape.num_experts
        if experts % ranks:
            fitting = ", ".join(str(number) for number in divisors(experts) if number > 1)
            raise ConfigError(
                f"--shape {shape.name!r} has {experts} experts, which {ranks} ranks do not divide; "
                f"start a number of ranks that does: {fitting}"
            )


def _capacity(shapes: Sequence[Shape]) -> Capacity:
    return Capacity(
        max(shape.tokens for shape in shapes),
        max(shape.dim for shape in shapes),
        max(shape.num_experts for shape in shapes),
        max(shape.top_k for shape in shapes),
    )
