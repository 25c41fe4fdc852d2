"""A limit on the time of a block of code, such as a compilation."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenyard import ConfigError

_AGAIN = 5.0  # seconds until the error is raised again, if the code caught it and continues
_SOON = 0.001  # seconds; 0 would cancel a timer


@contextmanager
def time_limit(option: str, seconds: float | None) -> Iterator[None]:
    """Context: raise TimeoutError in the block after so many seconds; None is no limit.

    Works in the main thread, between steps of Python. Compilers may turn the error into one of
    their own. A process has one such timer: another limit around this one, or that of a test
    runner, continues after the block, and fires there if it expired in the block. Raises
    ConfigError, which names the option, on a system without SIGALRM.
    """
    if seconds is None:
        yield
        return
    if not hasattr(signal, "setitimer"):
        raise ConfigError(f"{option} needs a system with SIGALRM, such as Linux; leave it out")

    running = True

    def stop(number: int, frame: Any) -> None:
        if running:  # a signal may also come while the block is left
            raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    begin = time.monotonic()
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            left = max(_SOON, outer - (time.monotonic() - begin))
            signal.setitimer(signal.ITIMER_REAL, left, interval)
