"""End a rank whose collective failed because of another rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_if_collective_fails() -> Iterator[None]:
    """Exit with code 1, and one sentence, if another rank missed a collective."""
    try:
        yield
    except Exception as error:
        from tokenyard_train.launch.faults import collective_fault, exit_with_fault  # torch

        fault = collective_fault(error)
        if fault is None:
            raise
        exit_with_fault(fault)
