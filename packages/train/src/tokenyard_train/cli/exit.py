"""End a rank whose collective failed because of another rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tokenyard_cli.once import is_first


@contextmanager
def exit_if_collective_fails() -> Iterator[None]:
    """Print one sentence and exit with code 1 if another rank missed a collective."""
    try:
        yield
    except Exception as error:
        from tokenyard_train.launch.faults import collective_fault, write_fault  # torch

        fault = collective_fault(error)
        if fault is None:
            raise
        rank = int(os.environ.get("RANK", "0"))
        write_fault(fault, rank)
        if is_first(f"failed in {fault.collective}"):
            sentence = f"error: process {rank} failed in {fault.collective}: {fault.reason}"
            print(sentence, file=sys.stderr, flush=True)
        # Threads of other groups may still wait for that rank and would keep this process alive.
        os._exit(1)
