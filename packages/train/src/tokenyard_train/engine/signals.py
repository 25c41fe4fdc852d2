"""Stop a run on a signal.

Ranks agree on it at the end of a step, which is saved.
"""

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
from tokenyard_train.engine.state import StopRequests
from tokenyard_train.launch.signals import signal_handler


class Stopped(TokenyardError):
    """A run stopped early on request. Its last step is saved."""

    exit_code = STOPPED


_SAME_REQUEST = 2.0
"""Seconds in which repeats are ignored: a launcher forwards signals that a rank also receives."""


@contextmanager
def stopping(requests: StopRequests) -> Iterator[None]:
    """Context: a signal sets ``requests.by_signal``, and a second one ends the process at once."""
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
        requests.by_signal = True

    with signal_handler(ask):
        yield
