"""Clocks, spreads and memory."""

import itertools

import pytest
import torch

from tokenyard.measure.memory import held_bytes, peak_bytes, saved_bytes
from tokenyard.measure.timing import Spread, measure


class Steps:
    """A clock on which every stamp is one later than the one before."""

    def __init__(self):
        self.ticks = itertools.count()
        self.prepared = 0

    def prepare(self, call):
        self.prepared += 1

    def stamp(self):
        return next(self.ticks)

    def between(self, stamps):
        return [float(stamp - stamps[0]) for stamp in stamps[1:]]


def test_works_take_turns_and_stages_hand_on_their_results():
    calls, clock = [], Steps()
    works = {
        "one": (
            lambda start: calls.append(("one", start)) or 5,
            lambda got: calls.append(("end", got)),
        ),
        "two": (lambda start: calls.append(("two", start)),),
    }
    spreads = measure(works, clock, repetitions=3, warmup=1)
    assert all(
        calls[at + 1] == ("end", 5) for at, call in enumerate(calls) if call == ("one", None)
    )
    begun = [name for name, _ in calls if name != "end"]
    rounds = [begun[at : at + 2] for at in range(0, 8, 2)]
    assert all(sorted(each) == ["one", "two"] for each in rounds)
    assert rounds.count(["one", "two"]) in (1, 2, 3), "each round has an order of its own"
    assert spreads == {"one": [Spread(1, 1, 1, 3), Spread(2, 2, 2, 3)], "two": [Spread(1, 1, 1, 3)]}
    assert clock.prepared == 8


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    x, w = torch.randn(100, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x @ w) * (x @ w).detach(), [w]) == 4 * (
        1000 + 1000
    )  # x, and the detached factor
    assert saved_bytes(lambda: x @ w, [w, x]) == 0


def test_saved_bytes_leaves_no_node_of_autograd():
    """One that is left keeps its stream, and a CUDA graph of another stream cannot be captured."""
    x = torch.randn(10, requires_grad=True)

    def work():
        y = x.exp()  # saves its result
        y.grad_fn.next_functions[0][0].metadata["measured"] = True
        return y

    assert saved_bytes(work, []) == 40
    assert "measured" not in x.exp().grad_fn.next_functions[0][0].metadata


def test_peak_bytes_sees_what_is_freed_again():
    def work(_):
        torch.empty(1 << 20, dtype=torch.float64).sum()
        return torch.ones(1 << 10)

    assert 8 << 20 <= peak_bytes((work,), torch.device("cpu")) < 9 << 20


def test_held_bytes_sees_what_the_result_keeps():
    def work():
        x = torch.ones(1 << 10, requires_grad=True)
        torch.empty(1 << 20).sum()
        return (x.exp() * 2).sum()  # autograd saves the exponentials

    assert held_bytes(work, torch.device("cpu")) == pytest.approx(2 * (4 << 10), rel=0.02)
