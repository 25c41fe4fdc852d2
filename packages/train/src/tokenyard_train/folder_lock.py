"""Let one process at a time write a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenyard import ConfigError


@contextmanager
def folder_lock(folder: Path, writer: str) -> Iterator[None]:
    """Context: hold the lock of an existing folder. `writer` says what another process does there.

    The system releases the lock when the process ends, however it ends. No file is left behind.
    Systems without `flock` have no lock. Raises ConfigError if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"another process {writer} {str(folder)!r}; wait until it ends, or give another folder"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
