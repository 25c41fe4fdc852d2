"""End the process of a command: exit code, one sentence for an error, no teardown of ranks."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from tokenyard_cli.once import FirstRankOnly, is_first

MISTAKE = 2
"""Exit code for a mistake in the config or on the machine. Another attempt would fail again."""

STOPPED = 75
"""Exit code of a run that stopped on request: EX_TEMPFAIL, which means "try again"."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_and_exit(command: Callable[[], Any]) -> None:
    """Run a command, then exit with 0, MISTAKE, STOPPED or, for any other exception, 1."""
    try:
        _run(command)
    except SystemExit as ending:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(ending.code, int | None):
            _exit_without_teardown(ending.code or 0)
        raise


def _exit_without_teardown(code: int) -> NoReturn:
    """Run the `atexit` functions, then end this rank without Python's teardown.

    A gloo thread may still hold the tensor of the last collective. If it releases the tensor after
    teardown has begun, it cannot take the GIL, and the process aborts.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(command: Callable[[], Any]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(FirstRankOnly())
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[handler]
    )
    try:
        command()
    except Exception as error:
        from tokenyard.errors import TokenyardError  # imports torch, so not at the top

        stopped = isinstance(error, TokenyardError) and error.exit_code == STOPPED
        if stopped:  # on all ranks
            line = f"{error}\n" if os.environ.get("RANK", "0") == "0" else ""
        else:
            sentence = f"error: {_sentence(error)}"
            line = f"{sentence}\n" if is_first(sentence) else ""
        # One write, so that lines of several ranks do not mix.
        sys.stderr.write(line)
        sys.exit(error.exit_code if isinstance(error, TokenyardError) else MISTAKE)


def _sentence(error: Exception) -> str:
    """Return the sentence for an error that another attempt would meet again.

    Raises any other error: it is one of the program.
    """
    from tokenyard.errors import TokenyardError
    from tokenyard.sharded import is_out_of_memory

    if isinstance(error, TokenyardError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        path = str(error.filename)
        name = path if len(path) <= 120 else f"{path[:60]}...{path[-40:]}"
        return f"{name} cannot be used: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"the output cannot be written: {error.strerror}"
    if is_out_of_memory(error):
        reason = " ".join(str(error).split())[:200] or "an allocation failed"
        return f"the memory is too small ({reason}); take a smaller model or shorter texts"
    raise error
