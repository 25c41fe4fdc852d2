"""Print what several ranks have to say once: the rank that comes first prints it.

Ranks share a folder of `tokenyard launch`, or the store of torchrun. Without either of them, every
rank prints. A text that only one rank has is therefore never lost.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from threading import Event

FOLDER = "TOKENYARD_NOTES"
"""The environment variable with the folder in which ranks write for their supervisor."""

_store_lost = Event()


def is_first(text: str) -> bool:
    """Return whether this rank is the first of the run to print a text. Each rank asks once."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    key = f"said-{blake2b(text.encode(), digest_size=16).hexdigest()}"
    folder = os.environ.get(FOLDER)
    return _is_first_in_store(key) if folder is None else _is_first_in_folder(Path(folder), key)


class FirstRankOnly(logging.Filter):
    """Passes a log record unless another rank logged the same text as often before."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether this rank logs the record."""
        try:
            text = record.getMessage()
        except Exception:  # of a library's wrong format, which the handler reports
            return True
        self.count[text] += 1
        return is_first(f"{self.count[text]} {record.levelname} {text}")


def _is_first_in_folder(folder: Path, key: str) -> bool:
    try:
        (folder / key).open("x").close()
    except FileExistsError:
        return False
    except OSError:  # a supervisor that is gone
        return True
    return True


def _is_first_in_store(key: str) -> bool:
    """Count in the store that torchrun keeps for its ranks, if it is the launcher.

    A rank that cannot reach the store waits for it once, not at each message.
    """
    if _store_lost.is_set():
        return True
    from tokenyard.processes import count_in_store  # imports torch, which --help does not need

    try:
        return count_in_store(key) in (None, 1)
    except Exception:  # the launcher is gone: a message twice is better than none
        _store_lost.set()
        return True
