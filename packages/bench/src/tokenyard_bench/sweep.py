"""The measured cases: every shape with every dtype and routing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from rich.console import Console

from tokenyard.measure.timing import Spread, Stages, clock_for, measure
from tokenyard_bench.case import DTYPES, Case, RoutingKind, make_case
from tokenyard_bench.shapes import Shape
from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record

_LINES = 4  # on the progress of the timing of a case

Say = Callable[[str], None]
"""Prints one line on what is done now."""


@dataclass(frozen=True)
class Sweep:
    """Which cases to measure, and how often."""

    shapes: Sequence[Shape]
    dtypes: Sequence[str]  # keys of DTYPES
    routings: Sequence[RoutingKind]
    device: torch.device
    activation: str = "swiglu"
    repetitions: int = 20
    seed: int = 0
    ranks: int = 1  # a case has the tokens of this many ranks

    def run(
        self, measure_case: Callable[[Case, Say], Iterable[Record]], console: Console
    ) -> Iterator[list[Record]]:
        """Measure every case. Yield the records of each, with its shape, dtype and routing.

        `measure_case` receives a function that prints what it does.
        """

        def say(step: str) -> None:
            print_line(console, f"  {step} ...", "dim")

        for shape, dtype, routing in product(self.shapes, self.dtypes, self.routings):
            print_line(console, f"{shape.name}, {dtype}, {routing} routing", "dim")
            torch.manual_seed(self.seed)
            whole = shape._replace(tokens=shape.tokens * self.ranks)
            case = make_case(whole, routing, DTYPES[dtype], self.device, self.activation)
            head = {"shape": shape._asdict(), "dtype": dtype, "routing": routing}
            yield [head | record for record in measure_case(case, say)]
            # The next case may need all memory.
            del case
            release_memory()

    def time(self, calls: dict[str, Stages], say: Say) -> dict[str, list[Spread]]:
        """Time calls in turns, as `measure` does."""

        def report(done: int, rounds: int) -> None:
            if done % max(1, rounds // _LINES) == 0:
                turn = f"round {done + 1} of {rounds} ({rounds - self.repetitions} to warm up)"
                say(f"timing {len(calls)} calls in turns, {turn}")

        return measure(calls, clock_for(self.device), self.repetitions, report=report)


def release_memory() -> None:
    """Free what is garbage and what backends keep of weights, and return cached GPU memory."""
    # A step of any optimizer drops copies of weights: here, of one without a gradient.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
