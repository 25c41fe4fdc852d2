"""Stopping a run on a signal: the step is finished and saved first."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tokenyard import TokenyardError
from tokenyard_cli.exit import STOPPED
from tokenyard_train.engine.state import Signals
from tokenyard_train.launch.signals import signal_handler


class Stopped(TokenyardError):
    """A run stopped early on request. Its last step is saved."""

    exit_code = STOPPED


_SAME_REQUEST = 2.0
"""Seconds in which further signals count as the first one.

A launcher passes on a signal that the rank also receives itself."""


@contextmanager
def stopping(signals: Signals) -> Iterator[None]:
    """Context: a signal sets ``signals.asked``, and a second one ends the process at once."""
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
        signals.asked = True

    with signal_handler(ask):
        yield
