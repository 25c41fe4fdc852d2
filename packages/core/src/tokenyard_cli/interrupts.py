"""Ctrl-C while a command imports its libraries."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fatal_interrupts() -> Iterator[None]:
    """Context: SIGINT ends the process at once instead of raising KeyboardInterrupt.

    It is for imports: torch's native modules abort the process if an exception reaches them.
    """
    python_raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not python_raises or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
