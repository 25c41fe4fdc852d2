"""What a run prints on."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class RunConsole(Console):
    """A console whose reader may go away, as `head` does: the run goes on, and its folder tells the rest."""

    def on_broken_pipe(self) -> None:
        """Print no more; rich's own ends the process."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
