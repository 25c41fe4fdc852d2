"""The on-disk cache folder that all packages share."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder ``$TOKENYARD_CACHE``, by default ``~/.cache/tokenyard``.

    The folder may not exist or may not be writable. Without a home directory, the path is one that
    cannot be created.
    """
    try:
        return Path(os.environ.get("TOKENYARD_CACHE") or "~/.cache/tokenyard").expanduser()
    except RuntimeError:  # the home directory is unknown
        return Path(os.devnull, "tokenyard")
