"""Times of the slowest rank: from idle devices, back to back, and by stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

from torch import Tensor

from tokenyard.measure.timing import Clock, Spread, Stages, run_stages
from tokenyard_bench.exchange.marks import STAGES, MarkedForward, Marks, end_pass
from tokenyard_bench.exchange.world import World
from tokenyard_cli.results import Record

_WARMUP = 3
_BATCHES = 3  # of steps back to back
_STEPS = 10  # in a batch, at most
_MARKED = 5  # steps with marks, at most


@dataclass(frozen=True)
class Timer:
    """Measures the two stages of a layer, on all ranks together."""

    world: World
    clock: Clock
    pause: float  # seconds before each step of `idle`
    repetitions: int

    def idle(self, stages: Stages) -> tuple[Spread, Spread]:
        """Time the forward and the backward pass, from idle devices at the same time."""
        samples = [self._once(stages) for _ in range(_WARMUP + self.repetitions)]
        forward, backward = zip(*self.world.largest(samples[_WARMUP:]))
        return Spread.of(forward), Spread.of(backward)

    def back_to_back(self, stages: Stages) -> Spread:
        """Time a step, one after another without a wait between them."""
        steps = min(_STEPS, self.repetitions)
        samples = []
        for _ in range(_BATCHES):
            self.world.meet()
            begin = self.clock.stamp()
            for _ in range(steps):
                run_stages(stages)
            samples.append([self.clock.between([begin, self.clock.stamp()])[0] / steps])
        return Spread.of([slowest for (slowest,) in self.world.largest(samples)])

    def stages(self, forward: MarkedForward, backward: Callable[[Tensor], object]) -> Record:
        """Return the stages of a step of median length, on the rank whose experts take longest.

        They add up to that rank's time. `forward_ms` and `backward_ms` are the slowest rank's.
        """
        count = min(_MARKED, self.repetitions)
        steps = [self._marked(forward, backward) for _ in range(count)]
        passes = self.world.largest([[sum(times) for times in both] for both in steps])
        totals = [sum(both) for both in passes]
        step = totals.index(median_low(totals))
        by_rank = self.world.gather([*steps[step][0], *steps[step][1]])
        experts = STAGES.index("experts")
        experts_ms = [values[experts] + values[experts + len(STAGES)] for values in by_rank]
        rank = experts_ms.index(max(experts_ms))
        return {
            "rank": rank,
            "forward_ms": round(passes[step][0], 5),
            "backward_ms": round(passes[step][1], 5),
            "forward": _named(by_rank[rank][: len(STAGES)]),
            "backward": _named(by_rank[rank][len(STAGES) :]),
        }

    def _once(self, stages: Stages) -> list[float]:
        """Return the milliseconds of each of two stages."""
        self.world.meet(self.pause)
        result = None
        stamps = [self.clock.stamp()]
        for stage in stages:
            result = stage(result)
            stamps.append(self.clock.stamp())
        forward, both = self.clock.between(stamps)
        return [forward, both - forward]

    def _marked(
        self, forward: MarkedForward, backward: Callable[[Tensor], object]
    ) -> tuple[list[float], list[float]]:
        """Return the milliseconds of STAGES, forward and backward."""
        self.world.meet(self.pause)
        marks = Marks(self.clock.stamp)
        y = forward(marks)
        end_pass(marks, "forward")
        backward(y)
        end_pass(marks, "backward")
        times = marks.times(self.clock.between)
        return times["forward"], times["backward"]


def _named(values: list[float]) -> dict[str, float]:
    return {stage: round(value, 5) for stage, value in zip(STAGES, values)}
