"""Consoles that commands print to."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_TABLE_COLUMNS = 150


class RunConsole(Console):
    """A console that survives a closed pipe, so that a run piped into `head` continues."""

    def on_broken_pipe(self) -> None:
        """Discard further output, where rich would exit the process."""
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: without markup, and as one line even if it is longer than the console.

    So a log file keeps the lines of a run whole.
    """
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def print_starting() -> None:
    """Say on a terminal that the program starts: importing torch takes seconds. Rank 0 only."""
    if sys.stdout.isatty() and os.environ.get("RANK", "0") == "0":
        print("starting ...", flush=True)


def wide_console() -> Console:
    """Return a console that is wide enough for tables, also if stdout is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_TABLE_COLUMNS)
