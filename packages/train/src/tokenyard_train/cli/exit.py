"""How the process of a command ends: with an exit code, one sentence for an error, and no teardown of ranks."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


def run_and_exit(app: Callable[[], Any]) -> None:
    """Run an app. Exit codes: 0, 2 for a mistake, 75 for a run that was asked to stop, else 1."""
    try:
        _run(app)
    except SystemExit as ended:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(ended.code, int | None):
            _leave(ended.code or 0)
        raise


def _leave(code: int) -> NoReturn:
    """End one of several ranks without Python's teardown, after the functions registered with `atexit`.

    A thread of gloo may still hold the tensor of the last collective. If it releases it after the teardown has begun,
    it cannot take the interpreter's lock any more, and the process aborts.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(app: Callable[[], Any]) -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    try:
        app()
    except Exception as error:
        from tokenyard.errors import TokenyardError  # loads torch, so not for --help

        if not isinstance(error, TokenyardError):
            _exit_if_collective_failed(error)
            raise
        from tokenyard_train.engine.signals import Stopped
        from tokenyard_train.launch.exit_codes import MISTAKE, STOPPED

        if isinstance(error, Stopped):
            if _rank() == 0:  # all ranks stop alike
                print(error, file=sys.stderr)
            sys.exit(STOPPED)
        sys.stderr.write(f"error: {error}\n")  # one write, since other ranks may write, too
        sys.exit(MISTAKE)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _exit_if_collective_failed(error: Exception) -> None:
    """Exit with a sentence and code 1 if another rank did not take part in a collective."""
    from tokenyard_train.launch.faults import fault_of, note_fault

    fault, rank = fault_of(error), _rank()
    if fault is not None:
        note_fault(fault, rank)
        print(
            f"error: process {rank} failed in {fault.collective}: {fault.reason}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(
            1
        )  # threads of other groups may still wait for that rank, and would keep this one alive
