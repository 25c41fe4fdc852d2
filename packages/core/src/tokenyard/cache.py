"""Where lies what is worth keeping from process to process."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that the environment variable ``TOKENYARD_CACHE`` names, or ``~/.cache/tokenyard``.

    It need not exist, nor be writable: for a user without a home it is a path that never is.
    """
    try:
        return Path(os.environ.get("TOKENYARD_CACHE") or "~/.cache/tokenyard").expanduser()
    except RuntimeError:  # there is no such home
        return Path(os.devnull, "tokenyard")
