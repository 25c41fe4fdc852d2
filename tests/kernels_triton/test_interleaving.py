"""Functions that run at the same time: any order is tried, and a fault of any order is found."""

import pytest

from . import interleaving
from .interleaving import Interleaving

SEEDS = range(40)


def order(seed):
    """Return the order in which three functions, and what they put off, do their steps."""
    done = []

    def steps(name, threads):
        for number in range(3):
            threads.later(lambda number=number: done.append(f"{name} later {number}"))
            threads.wait()
            done.append(f"{name} {number}")

    threads = Interleaving(seed)
    threads.together([lambda name=name: steps(name, threads) for name in "abc"])
    return done


def test_a_seed_repeats_its_order_and_others_have_others():
    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in SEEDS}) == len(SEEDS)


def test_a_race_is_found():
    """Two threads add to a number that each of them reads first."""

    def sum_of(seed):
        total = [0]
        threads = Interleaving(seed)

        def add():
            before = total[0]
            threads.wait()
            total[0] = before + 1

        threads.together([add, add])
        return total[0]

    assert {sum_of(seed) for seed in SEEDS} == {1, 2}


def test_a_deadlock_is_found():
    flags = set()
    threads = Interleaving(0)

    def after(one, other):
        threads.wait(lambda: one in flags)
        flags.add(other)

    with pytest.raises(AssertionError, match=r"deadlock.*seed 0"):
        threads.together([lambda: after("a", "b"), lambda: after("b", "a")])


def test_a_loop_without_an_end_is_found(monkeypatch):
    monkeypatch.setattr(interleaving, "MOST", 500)
    threads = Interleaving(0)

    def turn():
        while True:
            threads.wait()

    with pytest.raises(AssertionError, match="no end after 500 turns"):
        threads.together([turn, turn])


@pytest.mark.parametrize("later", [True, False])
def test_an_error_ends_all_functions(later):
    threads = Interleaving(1)

    def fail():
        raise ValueError("broken")

    def start():
        if later:
            threads.later(fail)
        else:
            fail()

    def wait():
        threads.together([lambda: threads.wait(lambda: False)])

    with pytest.raises(AssertionError, match="broken"):
        threads.together([wait, start])
