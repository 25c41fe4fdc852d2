"""The on-disk cache folder that all packages share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


def real_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path without links. A loop of links ends where it begins.

    ``Path.resolve`` raises RuntimeError for such a loop up to Python 3.12.
    """
    return Path(os.path.realpath(path))


def remove(path: Path) -> None:
    """Delete a file, a folder with its content, or a link but never what it points to.

    Does nothing if there is none. Raises OSError.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Context: write the file at the path that it yields. It is renamed to `path` on success.

    A failure, such as a full disk, deletes it and leaves what was at `path`.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
