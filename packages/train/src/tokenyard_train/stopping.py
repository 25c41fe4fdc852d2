"""Stopping a run when its process is asked to: the step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tokenyard import TokenyardError
from tokenyard_train.build import Run

STOPPED = 75
"""The exit code of a run that stopped because it was asked to: EX_TEMPFAIL, which says to try again."""


class Stopped(TokenyardError):
    """A run ended before its time, as it was asked to; what it had done is saved."""


@contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Meanwhile, let SIGTERM to any process of a run end it after the step that is under way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return

    def ask(number: int, frame: FrameType | None) -> None:
        run.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
