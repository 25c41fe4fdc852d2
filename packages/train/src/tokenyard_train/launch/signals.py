"""Signals that request a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Stop requests: by a scheduler, by Ctrl-C, and by a terminal that was closed."""


@contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context: call a handler on each of SIGNALS, and restore the old handlers at the end.

    Signals that the process ignores stay ignored (``nohup``).
    """
    current = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = {number: old for number, old in current.items() if old not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)
