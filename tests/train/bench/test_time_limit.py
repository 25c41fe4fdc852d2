"""A block of code that takes too long, and one that ends as its time does."""

import os
import signal
import time

import pytest

from tokenyard_train.bench.time_limit import time_limit


def test_a_block_that_takes_longer_ends_with_an_error():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"took more than 0\.05 s"), time_limit("--limit", 0.05):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_signal_that_comes_after_the_block_changes_nothing(monkeypatch):
    before = signal.getsignal(signal.SIGALRM)
    set_timer = signal.setitimer

    def late(which, seconds, interval=0.0):
        set_timer(which, seconds, interval)
        if seconds == 0:
            os.kill(os.getpid(), signal.SIGALRM)

    try:
        with monkeypatch.context() as patches, time_limit("--limit", 60):
            patches.setattr(signal, "setitimer", late)
    finally:
        after = signal.signal(signal.SIGALRM, before)
    assert after is before


@pytest.mark.parametrize("slept", [0.0, 0.4], ids=["behind it", "in it"])
def test_a_limit_within_another_does_not_cancel_it(slept):
    """The other one expires behind the inner block, or in it, and is raised behind it."""
    ended = []

    def work():
        with time_limit("--inner", 60):
            time.sleep(slept)
            ended.append("inner")
        time.sleep(60)

    with pytest.raises(TimeoutError, match=r"took more than 0\.2 s"), time_limit("--outer", 0.2):
        work()
    assert ended == ["inner"]


def test_the_timer_of_a_test_runner_continues():
    before = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with time_limit("--limit", 60):
            time.sleep(0.1)
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] < 99.95
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
