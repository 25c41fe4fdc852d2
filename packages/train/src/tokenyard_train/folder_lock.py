"""One writer per folder, by a lock that ends with its process and so is never stale."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenyard import ConfigError

LOCK = ".lock"
"""Lock file in a folder that is written. It holds the process id of the writer."""

PATIENCE = 1.0
"""Seconds to wait for a lock: a process that was killed holds its locks until it has ended."""

log = logging.getLogger("tokenyard")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Context: make a folder, and be the only process that writes to it.

    Raises ConfigError if another process holds the lock, or if the folder cannot be written.
    """
    with _lock(folder, folder / LOCK):
        yield


@contextmanager
def lock_new_folder(folder: Path) -> Iterator[None]:
    """Context: be the only process that makes `folder`, which is renamed into place later.

    The lock file is beside the folder. Raises ConfigError as `lock_folder`.
    """
    target = folder.absolute()
    with _lock(folder, target.with_name(f".{target.name}{LOCK}")):
        yield


@contextmanager
def _lock(folder: Path, path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, path)
    except OSError as error:
        raise ConfigError(
            f"folder {str(folder)!r} cannot be written: {error.strerror}; give another folder"
        ) from None
    try:
        yield
    finally:
        if _is_at(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(folder: Path, path: Path) -> int:
    """Return the descriptor of the locked file. Raises ConfigError if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            _flock(descriptor, folder, path)
        except BaseException:
            os.close(descriptor)
            raise
        # The last holder may have deleted the file between `open` and `flock`.
        if _is_at(descriptor, path):
            with suppress(OSError):  # a full disk: the lock holds without the process id
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)


def _flock(descriptor: int, folder: Path, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ConfigError(f"{path} is the lock of a folder and not a plain file; delete it")
    deadline = time.monotonic() + PATIENCE
    while (fault := _try_flock(descriptor)) is not None:
        if fault.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            log.warning(
                "folder %r cannot be locked (%s); make sure that no other process writes to it",
                str(folder),
                fault.strerror,
            )
            return
        if time.monotonic() > deadline:
            raise ConfigError(
                f"folder {str(folder)!r} is being written by {_holder(descriptor)}; "
                "wait until it ends, or give another folder"
            )
        time.sleep(0.05)


def _try_flock(descriptor: int) -> OSError | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
    return f"process {text}" if text.isdecimal() else "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path still names an open file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), found)
