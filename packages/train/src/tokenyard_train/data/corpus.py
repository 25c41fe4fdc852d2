"""Where text comes from: documents in an order that does not depend on the machine or the time."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenyard import ConfigError

_NOT_LIBRARY = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"))
_HELD_OUT_SHARE = 20  # one file of so many


class Document(NamedTuple):
    """One text."""

    name: str
    text: bytes  # UTF-8


def python_stdlib(held_out: bool) -> list[Document]:
    """Read the modules of the running Python's standard library, without its tests: one file in 20 is held out.

    Which ones depends on their path in the library only, so a module stays on its side from version to version. Raises
    ConfigError where the library is installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    library = (path.relative_to(root).as_posix() for path in _files(root, (".py",), _NOT_LIBRARY))
    documents = [Document(name, (root / name).read_bytes()) for name in library if _is_held_out(name) == held_out]
    kept = [document for document in documents if document.text and _is_utf8(document.text)]
    if not kept:
        raise ConfigError(f"name is 'python_stdlib', but {root} holds no source of the library; give files by 'text'")
    return kept


def text_files(paths: str | Sequence[str], suffixes: Collection[str]) -> list[Document]:
    """Read files, and the files of folders (at any depth) that have one of the suffixes, in the order of their names.

    Raises ConfigError for a path that is missing, holds no text, or is not UTF-8.
    """
    files = [file for path in ([paths] if isinstance(paths, str) else paths) for file in _named(Path(path), suffixes)]
    documents = [Document(file.as_posix(), _read(file)) for file in files]
    return [document for document in documents if document.text]


def _named(path: Path, suffixes: Collection[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"dataset.path {str(path)!r} does not exist; give a text file or a folder of them")
    files = list(_files(path, suffixes))
    if not files:
        ends = ", ".join(suffixes) or "nothing"
        raise ConfigError(
            f"dataset.path {str(path)!r} is a folder without files that end in {ends}; see dataset.suffixes"
        )
    return files


def _files(root: Path, suffixes: Collection[str], without: Collection[str] = ()) -> Iterator[Path]:
    """List the files under a folder by name, not entering the folders called as in `without`."""
    found: list[Path] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in without]
        found += [Path(folder, name) for name in files if name.endswith(tuple(suffixes))]
    yield from sorted(path for path in found if path.is_file())


def _read(file: Path) -> bytes:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"dataset.path: {file} cannot be read: {error.strerror}") from None
    if not _is_utf8(text):
        raise ConfigError(f"dataset.path: {file} is not UTF-8 text; convert it, or leave it out")
    return text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % _HELD_OUT_SHARE == 0
