"""End a process when the process that started it ends.

Without this, ranks train on, and hold their port, after their supervisor was killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

PARENT = "TOKENYARD_PARENT"
"""The environment variable with the process id of the supervisor."""

_POLL = 1.0  # seconds
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def die_with_supervisor() -> None:
    """Die with the supervisor that started this process, if one did."""
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        die_with_parent(int(parent))


def die_with_parent(parent: int) -> None:
    """Kill this process as soon as its parent, the process of that id, ends.

    On Linux the kernel does it, so it also ends a process that is stopped or blocked. Elsewhere a
    thread looks for the parent every second.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # The parent may have ended before.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGKILL)
