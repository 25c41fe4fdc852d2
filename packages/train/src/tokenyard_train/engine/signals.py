"""Stopping a run when its process is asked to: the step is finished and saved first."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tokenyard import TokenyardError
from tokenyard_train.engine.setup import Run
from tokenyard_train.launch.signals import handling


class Stopped(TokenyardError):
    """A run ended before its time, as it was asked to; what it had done is saved."""


_SAME_REQUEST = 2.0
"""Seconds in which further signals belong to the first: launchers pass on what a rank also gets itself."""


@contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Let a signal of SIGNALS, sent to any rank, stop the run after the current step; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return

    first = math.inf

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        first = min(first, time.monotonic())
        if time.monotonic() - first > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        run.asked = True

    with handling(ask):
        yield
