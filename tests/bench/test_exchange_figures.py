"""The figures of `bench exchange`, with ranks and a clock that are made up."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from tokenyard.measure.timing import Spread
from tokenyard_bench.case import make_case
from tokenyard_bench.exchange import measure
from tokenyard_bench.exchange.entrant import Candidate
from tokenyard_bench.exchange.marks import STAGES
from tokenyard_bench.exchange.measure import CaseMeasurement
from tokenyard_bench.exchange.rank_case import part_of
from tokenyard_bench.exchange.times import Timer
from tokenyard_bench.oracle import Verdict
from tokenyard_bench.shapes import Shape

SHAPE = Shape("small", 80, 16, 24, 8, 2)


class TwoRanks:
    """This rank, and a slower one: its stages take 1 ms more, and the largest twice as long."""

    device = torch.device("cpu")

    def meet(self, pause=0.0):
        pass

    def agree(self, fault):
        return fault

    def largest(self, samples):
        return [[2 * value for value in sample] for sample in samples]

    def gather(self, values):
        return [values, [value + 1 for value in values]]


class CountingClock:
    """Each stamp is 1 ms after the last."""

    def __init__(self):
        self.count = count()

    def stamp(self):
        return next(self.count)

    def between(self, stamps):
        return [stamp - stamps[0] for stamp in stamps[1:]]


@pytest.fixture
def timer():
    return Timer(TwoRanks(), CountingClock(), pause=0, repetitions=4)


def test_times_are_those_of_the_slowest_rank(timer):
    stages = (lambda _: None, lambda _: None)
    assert timer.idle(stages) == (Spread(2.0, 2.0, 2.0, 4), Spread(2.0, 2.0, 2.0, 4))
    assert timer.back_to_back(stages).median == 2 / 4  # of one step


def test_stages_are_those_of_the_rank_whose_experts_take_longest(timer):
    def forward(marks):
        marks.end("forward", "dispatch")
        marks.end("forward", "experts")

    record = timer.stages(forward, lambda y: None)
    assert record["rank"] == 1
    assert record["forward"] == dict.fromkeys(STAGES, 1.0) | dict.fromkeys(
        ("dispatch", "experts", "return"), 2.0
    )
    assert (record["forward_ms"], record["backward_ms"]) == (6.0, 2.0)


def measurement():
    """Return the measurement of a case whose passes take 2, 8 and 12 ns."""
    torch.manual_seed(0)
    case = part_of(make_case(SHAPE, "zipf", torch.float32, TwoRanks.device), 0, 2)
    spreads = [Spread(nanoseconds * 1e-6, 0, 0, 4) for nanoseconds in (2, 8, 12)]
    timer = SimpleNamespace(idle=lambda _: spreads[:2], back_to_back=lambda _: spreads[2])
    return CaseMeasurement(case, TwoRanks(), timer)


def test_rates_are_those_of_a_rank_and_rows_those_of_the_mean_and_the_busiest(monkeypatch):
    matmuls = SimpleNamespace(stages=lambda: None)
    rows = []
    monkeypatch.setattr(
        measure, "DenseMatmuls", lambda workload, count: rows.append(count) or matmuls
    )
    measured = measurement()
    teraflop = 6 * measured.case.slots * 16 * 24 / 1e12  # of a forward pass
    for record in measured.dense():
        assert record["forward_tflops"] == pytest.approx(teraflop / 2e-9)
        assert record["backward_tflops"] == pytest.approx(2 * teraflop / 8e-9)
        assert record["step_tflops"] == pytest.approx(3 * teraflop / 12e-9)
    on_rank = torch.bincount(measured.case.all_ids.flatten() // 4).tolist()
    assert rows == [80, max(on_rank)]
    assert max(on_rank) > 80


@pytest.mark.parametrize(("group", "allowed"), [("exchange", 1.0), ("peer", 8.0)])
def test_only_a_peer_may_be_coarse(monkeypatch, group, allowed):
    measured = measurement()
    entrant = SimpleNamespace(results=dict)

    def attempt(error, results):
        monkeypatch.setattr(measure, "judge_rank", lambda *_: Verdict(error, 1e-3, "y"))
        entrant.results = lambda: results
        return measured._try(Candidate("", group, None, lambda: entrant))

    assert "y is off by" in attempt(1.01e-3 * allowed, {})
    measured.first = {"y": torch.ones(2), "d x": torch.ones(2)}
    checked = attempt(0.99e-3 * allowed, {"y": torch.ones(2), "d x": torch.full((2,), 1.25)})
    assert checked.difference == pytest.approx(0.25)
