"""Commands in forked processes: their exit codes, output, time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 5
"""Seconds of computing after which a case hangs."""

MEGABYTES = 1024
"""Memory that a case may take beyond that of the imported libraries."""

_ROOM = 3072  # megabytes that a case gets, so that one which takes too many is seen


class Ended(NamedTuple):
    """How the commands of a case ended."""

    codes: list[int]  # exit codes, up to the first that is not 0; 70: a traceback
    signal: int  # the signal that killed the process, or 0
    megabytes: int  # largest memory, beyond that of the imported libraries
    seconds: float  # of computing
    folder: Path

    @property
    def succeeded(self) -> bool:
        """Whether all commands ended with 0."""
        return not self.signal and all(code == 0 for code in self.codes)

    def output(self, number: int = -1) -> str:
        """Return what a command wrote to stdout, by default the last one."""
        return self._text("out", number)

    def errors(self, number: int = -1) -> str:
        """Return what a command wrote to stderr, by default the last one."""
        return self._text("err", number)

    def _text(self, name: str, number: int) -> str:
        number = number if number >= 0 else max(len(self.codes) - 1, 0)
        path = self.folder / f"{number}.{name}"
        return path.read_text(errors="replace") if path.exists() else ""

    def fault(self) -> str | None:
        """Return what is wrong with the end itself: a crash, a hang, a traceback, too much memory.

        A command may succeed, or end with 1 or 2 and one sentence on stderr.
        """
        if self.signal:
            return f"killed by signal {self.signal} after {self.seconds:.1f} s of computing"
        if self.megabytes > MEGABYTES:
            return f"it took {self.megabytes} MB of memory"
        for number, code in enumerate(self.codes):
            errors = self.errors(number)
            if code not in (0, 1, 2) or "Traceback" in errors:
                return f"command {number} ended with {code}"
            sentences = [line for line in errors.splitlines() if line.startswith("error: ")]
            if code and len(sentences) != 1 and "Usage: " not in errors:
                return f"command {number} ended with {code} and {len(sentences)} sentences"
        return None


class ForkServer:
    """A process with torch imported, which forks one process for each case."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("fork_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._imported = 0
        self._imported = self.run(Path.cwd(), []).megabytes

    def run(
        self, folder: Path, commands: Sequence[Sequence[str]], path: Sequence[str] = ()
    ) -> Ended:
        """Run commands of `tokenyard` in a folder; `path` is searched first for modules."""
        request = {
            "folder": str(folder),
            "commands": [list(map(str, command)) for command in commands],
            "path": list(path),
            "seconds": SECONDS,
            "megabytes": _ROOM,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        answer["megabytes"] -= self._imported
        return Ended(**answer, folder=folder)

    def close(self) -> None:
        """End the server."""
        self._process.communicate()
