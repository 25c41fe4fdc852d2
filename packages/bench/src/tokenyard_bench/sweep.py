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
from tokenyard_cli.results import Record


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

    def run(
        self, measure_case: Callable[[Case], Iterable[Record]], console: Console
    ) -> Iterator[list[Record]]:
        """Measure every case. Yield the records of each, with its shape, dtype and routing."""
        for shape, dtype, routing in product(self.shapes, self.dtypes, self.routings):
            console.print(
                f"{shape.name}, {dtype}, {routing} routing ...", style="dim", highlight=False
            )
            torch.manual_seed(self.seed)
            case = make_case(shape, routing, DTYPES[dtype], self.device, self.activation)
            head = {"shape": shape._asdict(), "dtype": dtype, "routing": routing}
            yield [head | record for record in measure_case(case)]
            # The next case may need all memory.
            del case
            release_memory()

    def time(self, calls: dict[str, Stages]) -> dict[str, list[Spread]]:
        """Time calls in turns, as `measure` does."""
        return measure(calls, clock_for(self.device), self.repetitions)


def release_memory() -> None:
    """Free what is garbage, and return cached GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
