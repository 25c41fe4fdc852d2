"""Find files in folders, and describe them. Whatever cannot be read is an error."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard.bounded import require_plain
from tokenyard_train.data.paths import DELTA_LOG
from tokenyard_train.data.sources.formats import canonical_name

log = logging.getLogger("tokenyard")

_SAMPLED = 1 << 16  # bytes at each end of a file that its description hashes


def find_files(paths: str | Sequence[str], suffixes: Collection[str], key: str) -> list[Path]:
    """Return the given files, and the files in the given folders that have one of the suffixes.

    Folders are searched at any depth, and their files are sorted by path. Upper and lower case are
    equal in suffixes. Raises ConfigError for a missing or unreadable path, or for a folder without
    such files.
    """
    return [
        file
        for path in ([paths] if isinstance(paths, str) else paths)
        for file in _expand(Path(path), suffixes, key)
    ]


def repeated_files(files: Sequence[Path]) -> list[Path]:
    """Return the files that lead to the same file as an earlier one, by a link or another path."""
    seen: set[str] = set()
    repeated = []
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            repeated.append(file)
        seen.add(real)
    return repeated


def describe_file(file: Path, key: str) -> dict[str, Any]:
    """Return a file's name, size, and a digest of its first and last bytes. Raises ConfigError."""
    require_plain(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_SAMPLED))
            stream.seek(max(0, size - _SAMPLED))
            digest.update(stream.read(_SAMPLED))
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror}") from None
    return {"file": file.as_posix(), "bytes": size, "ends": digest.hexdigest()}


def list_files(root: Path, excluded: Collection[str] = ()) -> list[Path]:
    """List the files under a folder, sorted by path. Folders named in `excluded` are skipped.

    Links are followed; a folder that is reached twice is listed once. Raises ConfigError for a
    folder that cannot be read, and for a link to nothing.
    """
    paths: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, onerror=_refuse, followlinks=True):
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        subfolders[:] = sorted(name for name in subfolders if name not in excluded)
        paths += [Path(folder, name) for name in files]
    return sorted(paths)


def _expand(path: Path, suffixes: Collection[str], key: str) -> list[Path]:
    mode = _mode(path, key)
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{key} {str(path)!r} is no plain file; give a file of text or a folder")
    try:
        files = list_files(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    _refuse_table(path, files, key)
    chosen = list(_with_suffix(files, suffixes))
    for file in chosen:
        if not stat.S_ISREG(_mode(file, key)):
            raise ConfigError(f"{key}: {file} is no plain file; leave it out")
    if not chosen:
        ends = ", ".join(suffixes) or "nothing"
        raise ConfigError(
            f"{key} {str(path)!r} is a folder without files that end in {ends}; "
            "see dataset.suffixes"
        )
    _warn_left_out(path, set(files) - set(chosen))
    return chosen


def _refuse_table(path: Path, files: Sequence[Path], key: str) -> None:
    """Raise ConfigError for a Delta table: only its log says which of its files are current."""
    table = next((file.parent.parent for file in files if file.parent.name == DELTA_LOG), None)
    if table is not None:
        raise ConfigError(
            f"{key} {str(path)!r} holds the Delta table {table}, whose files have deleted and "
            "overwritten rows too; give its folder as dataset.delta (data pack: --delta)"
        )


def _with_suffix(files: Sequence[Path], suffixes: Collection[str]) -> Iterator[Path]:
    ends = tuple(canonical_name(suffix) for suffix in suffixes)
    return (file for file in files if canonical_name(file.name).endswith(ends))


def _warn_left_out(folder: Path, files: Collection[Path]) -> None:
    counts = Counter("".join(file.suffixes[-2:]) or "no suffix" for file in sorted(files))
    if counts:
        most = ", ".join(f"{suffix} ({count})" for suffix, count in counts.most_common(5))
        log.warning(
            "%s: %d files are left out, by suffix: %s; see dataset.suffixes",
            folder,
            len(files),
            most,
        )


def _mode(path: Path, key: str) -> int:
    """Return the mode of the file that a path leads to. Raises ConfigError."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(
                f"{key}: {path} is a link to nothing; repair it, or leave it out"
            ) from None
        raise ConfigError(
            f"{key} {str(path)!r} does not exist; give a file of text or a folder of them"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key} {str(path)[:200]!r} cannot be read: {reason}") from None


def _refuse(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}") from None
