"""Benchmark files: JSON with the machine, the settings and the records."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from tokenyard import ConfigError, TokenyardError
from tokenyard.paths import whole_file

FORMAT = 1

Record = dict[str, Any]
"""One measurement, with plain JSON values."""


def check_folder(folder: Path) -> None:
    """Raise TokenyardError if the folder of results cannot be made: before anything is measured."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise _unwritable(folder, errno.ENOTDIR)
    if not os.access(existing, os.W_OK):
        raise _unwritable(folder, errno.EACCES)


def write_results(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write ``folder/name.json`` and return its path. Raises TokenyardError if it cannot."""
    path = folder / f"{name}.json"
    text = json.dumps({"format": FORMAT, **content}, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error.errno) from None
    return path


def _unwritable(folder: Path, code: int | None) -> TokenyardError:
    return TokenyardError(f"--out {str(folder)!r} cannot be written: {os.strerror(code or 0)}")


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a benchmark file. Raises ConfigError for any other file."""
    advice = "give a JSON that tokenyard bench wrote"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {advice}") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON; give a file that tokenyard bench wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or "records" not in content:
        raise ConfigError(f"{path} is not a benchmark file of format {FORMAT}; {advice}")
    return content
